"""The operators as torch sees them, and as Python calls them."""
