"""How weights, captions and adapters lie in files; knows no model class."""
