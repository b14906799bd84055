"""One module per implementation, each run as a process of its own that writes the same figures."""
