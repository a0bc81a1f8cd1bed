"""The Stable Diffusion of the method's tests."""

from tests.infusion.conftest import sd, tokenizer

__all__ = ["sd", "tokenizer"]
