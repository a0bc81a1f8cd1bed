"""Teaches a text tower what captions say, before a diffusion model is trained on it."""

from collections.abc import Iterator, Sequence

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from data.pocket_two.captions import PLACE_WORDS, caption
from data.pocket_two.scene import CHOICES, NONE, NOUNS, SceneWords, ThingWords
from data.pocket_two.world import draw_scene
from ldm.models.text import TextEncoder
from ldm.training.optimise import adamw

OWN = ("noun", "colour", "second", "texture", "size")  # of an object
NOISE = 2.0  # so much that every word needs its share of the variance
PRESENT = ("style", "background", "noun", "colour", "texture", "place")


class CaptionBatches(IterableDataset):
    """Endless batches of captions (list of B) with their scenes' words (list of B); batch i depends on (seed, i)."""

    def __init__(self, batch_size: int, seed: int, start: int = 0):
        self.batch_size, self.seed, self.start = batch_size, seed, start

    def __iter__(self) -> Iterator[dict]:
        index = self.start
        while True:
            rng = np.random.default_rng([self.seed, index])
            words = [draw_scene(rng).words() for _ in range(self.batch_size)]
            yield {"captions": [caption(scene, rng) for scene in words], "words": words}
            index += 1


class CaptionData(pl.LightningDataModule):
    """Captions without images; a resumed run continues with the next batch."""

    def __init__(self, batch_size: int, seed: int = 0):
        super().__init__()
        self.batch_size, self.seed = batch_size, seed

    def train_dataloader(self) -> DataLoader:
        batches = CaptionBatches(self.batch_size, self.seed, self.trainer.global_step)
        return DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch)


class TextReading(pl.LightningModule):
    """A text encoder learns to say which looks belong to which noun.

    A linear layer reads an object's noun and looks from the encoding of its noun's last token, its noun from that of
    its place's last token, and all words of the scene from that of the end token, and from the pooled vector where
    there is one. The layers are not kept. A diffusion loss alone takes very long to tell whose colour is whose when a
    caption has two nouns.

    Nouns and looks are read through noise. Without it a word may be read from hardly any of an encoding's variance: a
    noun had less than 1 % of it at its own token, where a concept's method has to find it.
    """

    def __init__(self, text: TextEncoder, learning_rate: float = 1e-3):
        super().__init__()
        self.text, self.learning_rate = text, learning_rate
        self.things = nn.Linear(text.width, sum(len(CHOICES[part]) for part in OWN))
        self.nouns = nn.Linear(text.width, len(NOUNS))
        words = sum(len(CHOICES[part]) for part in PRESENT)
        self.scene = nn.Linear(text.width, words)
        self.pooled = None if text.pooled_width is None else nn.Linear(text.pooled_width, words)

    def training_step(self, batch: dict, index: int) -> Tensor:
        tokens = self.text.tokenizer(batch["captions"])  # (B, L)
        context = self.text.context(tokens)
        encodings = context.text.float()  # (B, L, D)
        ends = (tokens == self.text.tokenizer.eos).int().argmax(1)
        whole = self.scene(encodings[torch.arange(len(tokens)), ends])
        present = torch.stack([presence(words) for words in batch["words"]]).to(whole)
        of_scene = F.binary_cross_entropy_with_logits(whole, present)
        if self.pooled is not None:
            of_scene = of_scene + F.binary_cross_entropy_with_logits(self.pooled(context.pooled.float()), present)

        at_nouns, at_places = [], []  # (row, place among the tokens, object)
        for i, (ids, words) in enumerate(zip(tokens.tolist(), batch["words"], strict=True)):
            for thing in words.things:
                at_nouns.append((i, last_token(ids, self.text.tokenizer.encode(thing.noun)), thing))
                said = PLACE_WORDS[thing.place]
                if said in batch["captions"][i]:
                    at_places.append((i, last_token(ids, self.text.tokenizer.encode(said)), thing))
        rows, places, things = zip(*at_nouns, strict=True)
        own = self.things(noisy(encodings[list(rows), list(places)])).split([len(CHOICES[part]) for part in OWN], dim=1)
        of_things = sum(
            F.cross_entropy(logits, labels_of(things, part).to(logits.device))
            for logits, part in zip(own, OWN, strict=True)
        )
        rows, places, things = zip(*at_places, strict=True)
        at_place = self.nouns(noisy(encodings[list(rows), list(places)]))
        of_nouns = F.cross_entropy(at_place, labels_of(things, "noun").to(whole.device))
        self.log_dict({"train/scene": of_scene, "train/things": of_things, "train/nouns": of_nouns}, prog_bar=True)
        return 10 * of_scene + of_things + of_nouns

    def configure_optimizers(self) -> dict:
        return adamw(self.parameters(), self.learning_rate, self.trainer.max_steps)

    def weights(self) -> dict[str, Tensor]:
        return self.text.state_dict()


def noisy(encodings: Tensor) -> Tensor:
    """Encodings (N, D) at a mean square of 1, under noise of standard deviation `NOISE`."""
    return encodings * encodings.square().mean(-1, keepdim=True).rsqrt() + NOISE * torch.randn_like(encodings)


def labels_of(things: Sequence[ThingWords], part: str) -> Tensor:
    """One part of objects' words as indices into `CHOICES`, (N,) int64."""
    return torch.tensor([CHOICES[part].index(getattr(thing, part)) for thing in things])


def presence(words: SceneWords) -> Tensor:
    """Which words of each part of `PRESENT` a scene has, (sum of words,) float; a second colour counts as a colour."""
    found = []
    for part in PRESENT:
        if part in ("style", "background"):
            has = {getattr(words, part)}
        else:
            has = {getattr(thing, part) for thing in words.things}
        if part == "colour":
            has |= {thing.second for thing in words.things} - {NONE}
        found += [float(word in has) for word in CHOICES[part]]
    return torch.tensor(found)


def last_token(ids: Sequence[int], word: Sequence[int]) -> int:
    """Where a word, which is there, ends among token ids."""
    for start in range(len(ids) - len(word) + 1):
        if ids[start : start + len(word)] == list(word):
            return start + len(word) - 1
    raise ValueError(f"tokens {list(word)} are not among {list(ids)}")
