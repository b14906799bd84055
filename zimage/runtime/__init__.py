"""Reading checkpoints and managing memory; knows no model class."""
