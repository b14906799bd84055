"""Many requests at once: rows of a file, drawn by workers of a Ray cluster, with an index of what became of each."""
