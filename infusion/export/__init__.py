"""Concepts in other programs: pipelines of diffusers, and nodes for ComfyUI."""
