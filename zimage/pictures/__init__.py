"""Pictures: to and from tensors, to and from files."""
