"""One module per implementation; each run is a process of its own, and all of them write the same figures."""
