"""Concepts: what was learned, its file, and the files of others."""

FORMS = ("full", "half", "compact")  # of a concept file: float32, float16, at most 11,264 bytes
