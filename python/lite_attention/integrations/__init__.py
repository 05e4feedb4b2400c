"""Doors to other packages. None is imported by ``import lite_attention``; each needs the package it is named after."""
