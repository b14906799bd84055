"""Scores of pictures: against a base, over seeds, against their prompts; and rank tables of them."""
