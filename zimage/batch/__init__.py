"""Many requests on many workers: rows of a file, through Ray Data, to pictures and an index."""
