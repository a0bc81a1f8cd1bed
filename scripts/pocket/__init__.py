"""Experiments on the pocket world: `python -m scripts.pocket.X`."""
