"""Configs, flags, errors, files, runs and processes."""
