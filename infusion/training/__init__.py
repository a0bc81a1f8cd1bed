"""Trains one concept, or many at once; callbacks."""
