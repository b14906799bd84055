"""What can be asked for, declared once, and where values come from. Imports no torch: `--help` must be quick."""

from zimage.settings.declared import ALL_SETTINGS, LoadSettings, Request, RewriteSettings, Sampling, TextSettings

__all__ = ["ALL_SETTINGS", "LoadSettings", "Request", "RewriteSettings", "Sampling", "TextSettings"]
