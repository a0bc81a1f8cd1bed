"""Pocket two: a world of captioned 64-pixel scenes in which everything is known."""
