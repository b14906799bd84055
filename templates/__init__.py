"""Prompt templates, one Markdown file each; this package only says where they lie."""

from pathlib import Path

FOLDER = Path(__file__).parent
