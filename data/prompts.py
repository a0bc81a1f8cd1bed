"""Prompts that concepts are trained on."""

TEMPLATES = (  # short ones in the manner of Textual Inversion (Gal et al. 2022, appendix C)
    "a photo of a {}",
    "a photo of the {}",
    "a photo of one {}",
    "a close-up photo of a {}",
    "a good photo of the {}",
    "a cropped photo of the {}",
    "a bright photo of a {}",
    "an image of a {}",
    "image of the {}",
    "a picture of the {}",
    "{}",
)
