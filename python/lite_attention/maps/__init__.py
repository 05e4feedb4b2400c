"""What a map says: its grain, its words, the ranges and blocks it is made from."""
