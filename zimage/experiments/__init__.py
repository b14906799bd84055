"""Experiments: cells of a grid, rendered to pictures and records, scored, compared and looked at."""
