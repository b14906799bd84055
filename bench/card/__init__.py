"""Everything on one GPU, row by row, in one command: `command.py` is where it starts."""

from bench.card.command import card
from bench.card.models import random_model

__all__ = ["card", "random_model"]
