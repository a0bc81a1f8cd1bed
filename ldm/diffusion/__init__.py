"""The noise schedule and the loop that samples."""
