"""What the server costs: a picture through it, its first event, its previews, and many clients at once."""

from bench.serve.command import serve

__all__ = ["serve"]
