"""Trains the contextualizer of a text encoder, which diverse context needs (docs/regularisers.md)."""

import logging
from collections.abc import Iterator, Mapping
from itertools import chain, islice, repeat
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from infusion.covariance import read_captions, word_tokens
from infusion.regularisers.contextualizer import Contextualizer, save
from infusion.training.learner import Learner
from ldm.pipeline import StableDiffusion
from ldm.util.cli import UserError, check_range
from ldm.util.templates import short

logger = logging.getLogger(__name__)


class ContextualizerTraining(Learner):
    """Masked-language training on the frozen text encoder's states, by the recipe of the authors' repository.

    Every token of a caption is masked with the same probability, always by [MASK]. The cross-entropy of all tokens up
    to the end token, the begin token included, is summed, masked ones `masked_weight` times, and divided by the number
    of places, padding included: it cannot be compared with the regulariser's. A batch is a dict with `captions`, a list
    of B strings.

    Args:
        sd: the base model, of which only the text encoder is kept.
        learning_rate: of AdamW, constant.
        layers, heads: of the contextualizer.
        mask_probability: in (0, 1).
        seed: of the masks, which depend on seed, step and batch alone.
    """

    def __init__(
        self,
        sd: StableDiffusion,
        learning_rate: float = 1e-4,
        layers: int = 4,
        heads: int = 4,
        mask_probability: float = 0.15,
        masked_weight: float = 5.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_range("mask_probability", mask_probability, 0, 1, inside=True)
        check_range("learning_rate", learning_rate, 0, 1000, inside=True)
        self.text = sd.text.requires_grad_(False).eval()
        self.facts = {"base_architecture": sd.architecture, "base_sha256": sd.digests.get("text", "")}
        self.contextualizer = Contextualizer.of(sd.text, layers, heads)
        self.tensors = dict(self.contextualizer.named_parameters())
        self.learning_rate, self.seed = learning_rate, seed
        self.mask_probability, self.masked_weight = mask_probability, masked_weight
        self.told = False  # that captions are cut

    def training_step(self, batch: Mapping[str, list[str]], batch_idx: int) -> Tensor:
        tokenizer, captions = self.text.tokenizer, batch["captions"]
        tokens = tokenizer(captions)  # (B, L)
        full = (tokens[:, :-1] != tokenizer.eos).all(1).tolist()  # the others end before the last place
        longest = [caption for caption, whole in zip(captions, full, strict=True) if whole]
        if not self.told and (long := next(filter(tokenizer.beyond, longest), None)):
            read = tokenizer.context_length - 2
            logger.warning("warning: captions of more than %d tokens are cut, the first: %s", read, short(long))
            self.told = True
        draw = np.random.SeedSequence((self.seed, self.global_step, batch_idx, self.global_rank)).generate_state(1)
        generator = torch.Generator().manual_seed(int(draw[0]))
        chosen = torch.rand(tokens.shape, generator=generator) < self.mask_probability
        loss, accuracy = self.reading(tokens, word_tokens(tokenizer, tokens) & chosen)
        self.log_dict({"train/loss": loss, "train/accuracy": accuracy}, prog_bar=True, batch_size=len(tokens))
        return loss

    def reading(self, tokens: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of captions' ids (B, L), and the accuracy at the masked ones, (B, L) bool."""
        states = self.contextualizer.read(self.text, tokens, masked, None)
        tokens, masked = tokens.to(states.device), masked.to(states.device)
        counted = (tokens == self.text.tokenizer.eos).cumsum(1) == 0
        logits, labels, hidden = self.contextualizer(states, counted), tokens[counted], masked[counted]
        weights = 1 + (self.masked_weight - 1) * hidden  # (N,)
        loss = (weights * F.cross_entropy(logits.float(), labels, reduction="none")).sum() / tokens.numel()
        return loss, ((logits.argmax(-1) == labels) & hidden).sum() / hidden.sum().clamp(min=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.contextualizer.parameters(), lr=self.learning_rate)


class SaveContextualizer(pl.Callback):
    """Writes `<run>/models/contextualizer.safetensors` when training ends, in float16."""

    @rank_zero_only
    def on_train_end(self, trainer: pl.Trainer, pl_module: ContextualizerTraining) -> None:
        path = Path(trainer.default_root_dir) / "models" / "contextualizer.safetensors"
        save(path, pl_module.contextualizer, pl_module.facts | {"steps": trainer.global_step})


class CaptionFile(pl.LightningDataModule):
    """Endless batches {"captions": list of B} of a text file's lines in their order, again and again.

    Each process has its part of a batch; a resumed run continues with the next one. Shuffle the file beforehand.

    Args:
        path: captions, one a line, which are read as they are used. batch_size: on every device.

    Raises:
        ValueError: the file is missing, empty or not UTF-8 at its beginning.
    """

    def __init__(self, path: str, batch_size: int = 300) -> None:
        super().__init__()
        check_range("batch_size", batch_size, 1, 100_000)
        if next(read_captions(path), None) is None:
            raise UserError(f"{path}: holds no captions")
        self.path, self.batch_size = path, batch_size

    def train_dataloader(self) -> Iterator[dict[str, list[str]]]:
        trainer, size = self.trainer, self.batch_size
        whole, own = trainer.world_size * size, slice(trainer.global_rank * size, (trainer.global_rank + 1) * size)
        lines = chain.from_iterable(read_captions(path) for path in repeat(self.path))
        lines = islice(lines, trainer.global_step * trainer.accumulate_grad_batches * whole, None)
        while True:
            yield {"captions": list(islice(lines, whole))[own]}
