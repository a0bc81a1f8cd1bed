"""A learned concept, its file and the forms of that."""
