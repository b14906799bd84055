"""How the demo model is made: scenes, captions, trainings, export, scorer, card. `__main__.py` lists the steps."""
