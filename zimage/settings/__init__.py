"""What can be asked for, declared once, and where values come from. Imports no torch: `--help` must be quick."""

from zimage.settings.captions import TextSettings
from zimage.settings.declared import Request
from zimage.settings.loading import LoadSettings
from zimage.settings.rewriting import RewriteSettings, Sampling

__all__ = ["LoadSettings", "Request", "RewriteSettings", "Sampling", "TextSettings"]
