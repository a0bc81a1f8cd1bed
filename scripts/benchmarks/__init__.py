"""What a concept costs: the cases that are measured, how they are, and all that waits for a GPU."""
