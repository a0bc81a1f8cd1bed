"""How fast, how lean and how busy: the method beside the base model, diffusers and the released design.

`settings` names everything, `cases` says what is timed (`inputs`: on what, `peer`: diffusers' part, `reenactment`: the
released design's), `timing` measures in turn, `memory` measures peaks, `run` gathers it and `table` shows it.
"""
