"""Fidelity, alignment and diversity, as cosines of unit-length features (`infusion.metrics.run.features`).

| published as | here |
|---|---|
| CLIP-I, DINO (DreamBooth, arXiv 2208.12242, section 4.1) | `pairwise(samples of the concept, its photos)` |
| CLIP-T (the same) | `alignment(images, prompts)`; CustomConcept101 multiplies it by 2.5, this does not |
| PRES (DreamBooth, section 4.3) | `pairwise(samples of the superclass without the concept, its photos)`, with DINO |
| DIV (DreamBooth, section 4.3) | `lpips_diversity`; `diversity` is the same of features |
| drift of the PEFT image benchmark | `drift(base samples, customised samples)`, of the same seeds |

PRES is better low: a model whose every dog has become the concept scores high. It is read against the base model's own.
DreamBooth calls DIV an "average LPIPS cosine similarity", but its table has it better high; here it is the mean LPIPS
distance. Of features every function takes (N, D) of any floating-point dtype at unit length, and computes in float64.

Means over images say nothing about other photos: with the same few photos in each, their standard error is that of
other samples for these photos.
"""

from collections.abc import Hashable, Sequence
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor
from torchmetrics.functional.image.lpips import _NoTrainLpips

from ldm.util.cli import UserError
from ldm.weights.checkpoint import load_component


def pairwise(images: Tensor, photos: Tensor) -> Tensor:
    """Mean cosine of each image with the photos: features (B, D) and (P, D) -> (B,) in [−1, 1].

    Raises ValueError, as every function here, for features that are not of one width and unit length.
    """
    images, photos = _unit(images, photos)
    return (images @ photos.mT).mean(1)


def among(photos: Tensor) -> Tensor:
    """Mean cosine of each photo with the others, (P, D) -> (P,): the ceiling of `pairwise`, real against real.

    Raises:
        ValueError: fewer than 2 photos.
    """
    (photos,) = _unit(photos)
    if len(photos) < 2:
        raise UserError("a ceiling needs at least 2 photos")
    cosines = photos @ photos.mT  # (P, P)
    return (cosines.sum(1) - cosines.diagonal()) / (len(photos) - 1)


def alignment(images: Tensor, texts: Tensor) -> Tensor:
    """Cosine of each image with its own text, (B, D) and (B, D) -> (B,) in [−1, 1]."""
    images, texts = _unit(images, texts)
    return _rows(images, texts)


def drift(base: Tensor, customised: Tensor) -> Tensor:
    """(1 − cos) / 2 of each base sample and the customised sample of its seed, (B, D) twice -> (B,) in [0, 1]."""
    base, customised = _unit(base, customised)
    return (1 - _rows(base, customised)) / 2


def diversity(features: Tensor, groups: Sequence[Hashable]) -> Tensor:
    """Mean of 1 − cos over all pairs of samples of one prompt.

    Args:
        features: (B, D).
        groups: the prompt of each sample, or anything that says which belong together.

    Returns:
        (G,) in [0, 2], prompts in the order of their first samples.

    Raises:
        ValueError: not one group a sample, or a group of one.
    """
    (features,) = _unit(features)
    means = []
    for rows in _grouped(groups, len(features)):
        cosines = features[rows] @ features[rows].mT  # (n, n)
        means.append(1 - (cosines.sum() - cosines.trace()) / (len(rows) * (len(rows) - 1)))
    return torch.stack(means)


@torch.no_grad()
def lpips_diversity(images: Tensor, groups: Sequence[Hashable], alexnet: str | Path) -> Tensor:
    """Mean LPIPS distance (Zhang et al. 2018, AlexNet, version 0.1) over all pairs of samples of one prompt.

    The network is torchmetrics', whose package has LPIPS's own weights but downloads AlexNet's: here they are a file.

    Args:
        images: (B, 3, H, W) in [0, 1], of at least 64 pixels a side.
        groups: as for `diversity`.
        alexnet: torchvision's AlexNet of ImageNet, `alexnet-owt-7be5be79.pth`, or the same in safetensors.

    Returns:
        (G,) float64, prompts in the order of their first samples.

    Raises:
        ValueError: no such file or not AlexNet's, not one group an image, or a group of one.
    """
    every = _grouped(groups, len(images))
    network = _lpips(alexnet).to(images.device)
    means = []
    for rows in every:
        distances = [network(images[i][None], images[j][None], normalize=True) for i, j in combinations(rows, 2)]
        means.append(torch.stack(distances).double().mean())
    return torch.stack(means)


def _lpips(alexnet: str | Path) -> _NoTrainLpips:
    """LPIPS in evaluation mode, on the CPU."""
    network = _NoTrainLpips(net="alex", pnet_rand=True)  # random AlexNet, LPIPS's own weights
    source = load_component(alexnet, "features.")
    target = network.net.state_dict()  # "slice2.3.weight" is layer 3 of `features`
    tensors = {name: source.get(name.partition(".")[2]) for name in target}
    if wrong := [name for name, tensor in tensors.items() if tensor is None or tensor.shape != target[name].shape]:
        raise UserError(
            f"{alexnet}: is not torchvision's AlexNet, whose features.{wrong[0].partition('.')[2]} it lacks"
        )
    network.net.load_state_dict(tensors)
    return network


def _rows(first: Tensor, second: Tensor) -> Tensor:
    if len(first) != len(second):
        raise ValueError(f"{len(first)} features cannot be matched with {len(second)}")
    return (first * second).sum(1)


def _grouped(groups: Sequence[Hashable], count: int) -> list[list[int]]:
    """Rows of each group."""
    if len(groups) != count:
        raise ValueError(f"{len(groups)} groups for {count} samples")
    rows: dict[Hashable, list[int]] = {}
    for i, group in enumerate(groups):
        rows.setdefault(group, []).append(i)
    if alone := [group for group, members in rows.items() if len(members) < 2]:
        raise UserError(f"diversity needs at least 2 samples of a prompt, and there is 1 of {alone[0]!r}")
    return list(rows.values())


def _unit(*features: Tensor) -> list[Tensor]:
    """Features in float64."""
    for one in features:
        if one.dim() != 2 or len(one) == 0 or one.shape[1] != features[0].shape[1]:
            raise ValueError(
                f"features must be (N, D) of one width, not {', '.join(str(tuple(f.shape)) for f in features)}"
            )
        if not ((one.double().norm(dim=1) - 1).abs() < 1e-3).all():
            raise ValueError("features must have unit length")
    return [one.double() for one in features]
