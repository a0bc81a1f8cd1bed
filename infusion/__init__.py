"""Infusion (Zeng et al., 2024, arXiv 2404.14007): residual value embeddings on the attention maps of a frozen model."""
