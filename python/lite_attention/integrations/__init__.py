"""Doors to other packages. None is imported by ``import lite_attention``; each imports its package where it is used."""
