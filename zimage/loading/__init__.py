"""From files to modules in memory: found, checked, planned, loaded, let go."""
