"""How files store weights and adapters; nothing here knows a model class."""
