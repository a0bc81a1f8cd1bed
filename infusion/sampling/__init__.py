"""Sampling with concepts: settings, regions, prompts, pictures."""
