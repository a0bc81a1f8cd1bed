"""The forms of a concept file: float32, float16, and `infusion.concepts.compact`'s, which is at most 11,264 bytes."""

COMPACT = "compact"
FORMS = ("full", "half", COMPACT)
