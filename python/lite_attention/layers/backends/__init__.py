"""The backends of this package."""
