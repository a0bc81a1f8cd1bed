"""Why the gate compares SDXL's encodings under each encoder's final norm: on two trained encoders that can be had here.

Pocket's text encoder and its CLIP's text tower stand for SDXL's two: penultimate layers, one beside the other.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from data.pocket.world import NOUNS, caption, draw_scene
from data.prompts import TEMPLATES
from infusion.covariance import invert, word_tokens
from infusion.gate import similarity
from infusion.metrics.run.features import load_pocket_clip
from infusion.tokens import concept_mask
from ldm.pipeline import StableDiffusion


class Both:
    """Encodings (B, L, 256) of the penultimate layers, as they are and under the final norms."""

    def __init__(self, configs) -> None:
        texts = StableDiffusion.from_checkpoint(configs / "pocket.yaml").text, load_pocket_clip().text
        self.tokenizer = texts[0].tokenizer
        self.towers = [text.transformer["text_model"] for text in texts]

    def __call__(self, prompts: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        ids = self.tokenizer(prompts)
        raw = [tower(input_ids=ids, output_hidden_states=True).hidden_states[-2] for tower in self.towers]
        normed = [tower.final_layer_norm(part) for tower, part in zip(self.towers, raw, strict=True)]
        return ids, {"raw": torch.cat(raw, -1), "normed": torch.cat(normed, -1)}


@pytest.fixture(scope="module")
@torch.no_grad()
def similarities(configs) -> dict[tuple[str, str], dict[str, Tensor]]:
    """(space, metric) -> s / E of the concept's own word in other prompts, of other nouns, and of other words."""
    both, rng = Both(configs), np.random.default_rng(0)
    captions = [caption(draw_scene(rng), rng) for _ in range(1600)]
    covariances = {space: torch.zeros(256, 256, dtype=torch.float64) for space in ("raw", "normed")}
    tokens = 0
    for start in range(0, 1200, 200):
        ids, encodings = both(captions[start : start + 200])
        counted = word_tokens(both.tokenizer, ids)
        tokens += int(counted.sum())
        for space, covariance in covariances.items():
            covariance += encodings[space][counted].double().mT @ encodings[space][counted].double()
    ids, encodings = both(captions[1200:])
    words, noun_ids = word_tokens(both.tokenizer, ids), {noun: both.tokenizer.encode(noun) for noun in NOUNS}
    single = {noun: own[0] for noun, own in noun_ids.items() if len(own) == 1}
    nouns = torch.isin(ids, torch.tensor(list(single.values())))
    found: dict[tuple[str, str], dict[str, list[Tensor]]] = {}
    for noun, own in single.items():
        prompts, masks = zip(*(concept_mask(both.tokenizer, template, noun) for template in TEMPLATES), strict=True)
        _, training = both(list(prompts))
        places = {"own": ids == own, "other nouns": nouns & (ids != own), "other words": words & ~nouns}
        for space, covariance in covariances.items():
            target = training[space][torch.stack(masks)].mean(0)
            inverse = invert(covariance / tokens, ridge=0.001)[0].float()
            for metric, matrix in (("identity", None), ("covariance", inverse)):
                values = similarity(encodings[space], target, matrix)
                rows = found.setdefault((space, metric), {name: [] for name in places})
                for name, mask in places.items():
                    rows[name].append(values[mask])
    return {kind: {name: torch.cat(values) for name, values in rows.items()} for kind, rows in found.items()}


def opened(values: Tensor) -> float:
    """The mean gate of β 0.75, τ 0.1."""
    return torch.sigmoid((values - 0.75) / 0.1).mean().item()


def test_without_the_norm_other_words_look_like_the_concept(similarities):
    for (space, metric), rows in similarities.items():
        shown = (f"{n} {v.mean():.2f} (95 %: {v.quantile(0.95):.2f}; gate {opened(v):.2f})" for n, v in rows.items())
        print(f"{space}, {metric}: {', '.join(shown)}")
    raw, normed = similarities["raw", "identity"], similarities["normed", "identity"]
    assert raw["other words"].quantile(0.95) > 0.8 and normed["other words"].quantile(0.95) < 0.5
    assert opened(raw["other words"]) > 10 * opened(normed["other words"])
    assert opened(normed["own"]) > 0.8 * opened(raw["own"])  # and the word itself hardly less


def test_a_covariance_does_as_much_with_the_norm_as_without(similarities):
    raw, normed = similarities["raw", "covariance"], similarities["normed", "covariance"]
    for name in raw:
        assert abs(raw[name].mean() - normed[name].mean()) < 0.05
    assert opened(raw["other words"]) < 0.01 and opened(normed["other words"]) < 0.01
