"""CLIPSeg (Lüddecke and Ecker 2022, arXiv 2112.10003): images and texts in, soft masks out."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPSegConfig, CLIPSegForImageSegmentation

from ldm.models.tokenizer import Tokenizer
from ldm.util.cli import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, which CLIPSeg was trained with
LEGACY_END = 2  # configs from before transformers 4.31 say this, and mean the highest id of a text


class ClipSeg(nn.Module):
    """transformers' CLIPSeg network, from images in [0, 1] to masks.

    CLIP's image tower is run once for an image, its text tower once for a prompt; only the decoder, 64 wide, is run for
    every pair. Unlike transformers' own `forward`, everything carries gradients.

    Args:
        config: of the network.
        tokenizer: of the prompts.
        image_size: side S of the squares that the network sees; images are resized to it. A multiple of the patch size.

    Raises:
        ValueError: tokenizer, image size and config do not fit.
    """

    def __init__(self, config: CLIPSegConfig, tokenizer: Tokenizer, image_size: int = 352) -> None:
        super().__init__()
        text, patch = config.text_config, config.vision_config.patch_size
        if tokenizer.vocab_size != text.vocab_size or text.eos_token_id not in (tokenizer.eos, LEGACY_END):
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} ids, the last of which ends a text; the text tower has "
                f"{text.vocab_size}, and {text.eos_token_id} for the end"
            )
        if tokenizer.context_length > text.max_position_embeddings:
            raise UserError(
                f"the tokenizer's context_length is {tokenizer.context_length}, the text tower's "
                f"max_position_embeddings {text.max_position_embeddings}"
            )
        if image_size % patch:
            raise UserError(f"image_size: must be a multiple of the patch size {patch}, not {image_size}")
        self.tokenizer, self.image_size = tokenizer, image_size
        self.network = CLIPSegForImageSegmentation(config)
        # in no file of weights: keep them real when everything else is built on the meta device
        for tower in (self.network.clip.text_model, self.network.clip.vision_model):
            embeddings = tower.embeddings
            embeddings.position_ids = torch.arange(embeddings.position_ids.shape[-1], device="cpu")[None]  # (1, L)

    @property
    def device(self) -> torch.device:
        return self.network.device

    def squeeze(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> (B, 3, S, S), without keeping their aspect, as CLIPSeg was trained."""
        size = (self.image_size, self.image_size)
        return images if images.shape[-2:] == size else F.interpolate(images, size, mode="bilinear", antialias=True)

    def features(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) in [0, 1] -> activations of the chosen layers, each (B, 1 + patches, width)."""
        images = self.squeeze(images)
        mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        states = self.network.clip.vision_model((images - mean) / std, output_hidden_states=True).hidden_states
        return [states[layer + 1] for layer in self.network.extract_layers]  # states[0] comes before the first layer

    def conditions(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> (B, D), CLIP's text features, not normalised."""
        tokens = self.tokenizer(prompts)  # (B, L)
        ends = (tokens == self.tokenizer.eos).int().argmax(1)
        tokens = tokens[:, : ends.max() + 1]  # attention is causal: nothing behind the end matters
        return self.network.clip.get_text_features(tokens.to(self.device)).pooler_output

    def decode(self, features: Sequence[Tensor], conditions: Tensor) -> Tensor:
        """`features` of B images and `conditions` (B, D) -> logits (B, S, S)."""
        return self.network.decoder(list(features), conditions).logits

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Images (B, 3, H, W) in [0, 1], a prompt for each -> logits (B, S, S)."""
        return self.decode(self.features(images), self.conditions(prompts))

    @torch.no_grad()
    def masks(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Masks of what all the prompts name: the sigmoid, averaged over the prompts.

        Args:
            images: (B, 3, H, W) in [0, 1], on any device.
            prompts: at least one.

        Returns:
            (B, S, S) float32 in [0, 1] on the CPU.

        Raises:
            ValueError: no prompt.
        """
        if not prompts:
            raise UserError("prompts: at least one is wanted")
        features = self.features(images.to(self.device))
        total = torch.zeros(())
        for condition in self.conditions(prompts):  # (D,)
            logits = self.decode(features, condition.expand(len(images), -1))
            total = total + logits.float().sigmoid().cpu()
        return total / len(prompts)
