"""Experiments on pocket two: `python -m scripts.pocket_two.X`."""
