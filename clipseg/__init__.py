"""Soft masks of what a text names (CLIPSeg, Lüddecke and Ecker 2022, arXiv 2112.10003)."""
