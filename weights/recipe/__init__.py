"""How the demo model is made: scenes, captions, trainings, export, scorer, card. `__main__.py` lists the steps.

The recipe stays in the clone: an editable install finds it as `zimage.weights.recipe`, a wheel does not hold it.
"""
