"""Weights that ship with the package; this module only says where they lie."""

from pathlib import Path

DEMO = Path(__file__).parent / "demo"
