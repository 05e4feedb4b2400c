"""Who writes a map: one file for each kind of sparse attention."""
