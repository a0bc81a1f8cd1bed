"""CLIP: an image tower and a text tower with a shared space (Radford et al. 2021), both from transformers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from ldm.models.text import ClipText

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Clip(nn.Module):
    """Unit-length features of images and of texts."""

    def __init__(self, text: ClipText, image_size: int = 224, patch_size: int = 14, width: int = 1024, layers: int = 24,
                 heads: int = 16, features: int = 768):  # fmt: skip
        super().__init__()
        config = CLIPVisionConfig(
            hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads,
            image_size=image_size, patch_size=patch_size, projection_dim=features)  # fmt: skip
        self.image_size = image_size
        self.text = text
        self.vision = CLIPVisionModel(config)
        self.visual_projection = nn.Linear(width, features, bias=False)
        self.text_projection = nn.Linear(text.width, features, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def image_features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> (B, features), resized to the tower's size."""
        if images.shape[-1] != self.image_size or images.shape[-2] != self.image_size:
            images = F.interpolate(images, (self.image_size, self.image_size), mode="bicubic", antialias=True).clamp(
                0, 1
            )
        mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        pooled = self.vision(pixel_values=(images - mean) / std).pooler_output
        return F.normalize(self.visual_projection(pooled).float(), dim=-1)

    def text_features(self, prompts: list[str]) -> Tensor:
        """Prompts -> (B, features), read at each prompt's first end token."""
        tokens = self.text.tokenizer(prompts).to(self.logit_scale.device)  # (B, L)
        encodings = self.text.encode_tokens(tokens)  # (B, L, D)
        ends = (tokens == self.text.tokenizer.eos).int().argmax(1)
        return F.normalize(self.text_projection(encodings[torch.arange(len(tokens)), ends]).float(), dim=-1)
