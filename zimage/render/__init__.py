"""One request to pixels."""
