"""Experiments: what a config says, the graph of tasks that follows from it, and how they are run and estimated."""
