"""Fidelity, alignment and diversity, as cosines of unit-length features (`infusion.metrics.run.features`).

| published as | here |
|---|---|
| CLIP-I, DINO (DreamBooth, arXiv 2208.12242, section 4.1) | `pairwise(samples of the concept, its photos)` |
| CLIP-T (the same) | `alignment(images, prompts)`; CustomConcept101 multiplies it by 2.5, this does not |
| PRES (DreamBooth, section 4.3) | `pairwise(samples of the superclass without the concept, its photos)`, with DINO |
| DIV (DreamBooth, section 4.3) | `lpips_diversity`; `diversity` is the same of features |
| drift of the PEFT image benchmark | `drift(base samples, customised samples)`, of the same seeds, but of CLIP |

PRES is better low: a model whose every dog has become the concept scores high. It is read against the base model's own.
The formula of drift is that of PEFT's benchmark, which has it of DINOv2: its values are others.
DreamBooth calls DIV an "average LPIPS cosine similarity", but its table has it better high; here it is the mean LPIPS
distance. Of features every function takes (N, D) of any floating-point dtype at unit length, and computes in float64.

Means over images say nothing about other photos: with the same few photos in each, their standard error is that of
other samples for these photos.
"""

from collections.abc import Hashable, Sequence
from importlib import resources
from itertools import combinations
from pathlib import Path

import torch
import torch.nn.functional as F
import torchmetrics
import torchvision
from torch import Tensor, nn

from ldm.util.cli import UserError
from ldm.weights.checkpoint import load_component

HEADS = "functional/image/lpips_models/alex.pth"  # of torchmetrics: LPIPS's weights of AlexNet's channels
SCALING = ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450))  # mean and standard deviation that LPIPS takes off


def pairwise(images: Tensor, photos: Tensor) -> Tensor:
    """Mean cosine of each image with the photos: features (B, D) and (P, D) -> (B,) in [−1, 1]."""
    return (images.double() @ photos.double().mT).mean(1)


def among(photos: Tensor, versions: Tensor | None = None) -> Tensor:
    """Mean cosine of each photo with the others, (P, D) -> (P,), P ≥ 2: the ceiling of `pairwise`, real against real.

    Args:
        versions: of the photos, (P, D), such as each of them through an autoencoder, to be compared with the others in
            their place.
    """
    versions = photos if versions is None else versions
    cosines = versions.double() @ photos.double().mT  # (P, P)
    return (cosines.sum(1) - cosines.diagonal()) / (len(photos) - 1)


def alignment(images: Tensor, texts: Tensor) -> Tensor:
    """Cosine of each image with its own text, (B, D) and (B, D) -> (B,) in [−1, 1]."""
    return (images.double() * texts.double()).sum(1)


def drift(base: Tensor, customised: Tensor) -> Tensor:
    """(1 − cos) / 2 of each base sample and the customised sample of its seed, (B, D) twice -> (B,) in [0, 1]."""
    return (1 - alignment(base, customised)) / 2


def diversity(features: Tensor, groups: Sequence[Hashable]) -> Tensor:
    """Mean of 1 − cos over all pairs of samples of one prompt.

    Args:
        features: (B, D).
        groups: the prompt of each sample, or anything that says which belong together; at least 2 of each.

    Returns:
        (G,) in [0, 2], prompts in the order of their first samples.
    """
    means = []
    for rows in _grouped(groups):
        own = features[rows].double()
        cosines = own @ own.mT  # (n, n)
        means.append(1 - (cosines.sum() - cosines.trace()) / (len(rows) * (len(rows) - 1)))
    return torch.stack(means)


@torch.no_grad()
def lpips_diversity(images: Tensor, groups: Sequence[Hashable], alexnet: str | Path) -> Tensor:
    """Mean LPIPS distance (Zhang et al. 2018, AlexNet, version 0.1) over all pairs of samples of one prompt.

    LPIPS's own weights are those in torchmetrics' package, AlexNet's are a file.

    Args:
        images: (B, 3, H, W) in [0, 1], of at least 64 pixels a side.
        groups: as for `diversity`.
        alexnet: torchvision's AlexNet of ImageNet, `alexnet-owt-7be5be79.pth`, or the same in safetensors.

    Returns:
        (G,) float64, prompts in the order of their first samples.

    Raises:
        UserError: no such file, or not AlexNet's.
    """
    network, heads = _lpips(alexnet)
    network.to(images.device)
    seen = [_layers(network, image[None]) for image in images]
    means = []
    for rows in _grouped(groups):
        distances = [_distance(seen[i], seen[j], heads) for i, j in combinations(rows, 2)]
        means.append(torch.stack(distances).double().mean())
    return torch.stack(means)


def _lpips(alexnet: str | Path) -> tuple[nn.Sequential, list[Tensor]]:
    """AlexNet's layers of a file, on the CPU, and LPIPS's weight of each channel, (C, 1, 1) for each of 5 layers."""
    network = torchvision.models.alexnet(weights=None).features.requires_grad_(False).eval()
    source, target = load_component(alexnet, "features."), network.state_dict()
    for name, tensor in target.items():
        if name not in source or source[name].shape != tensor.shape:
            raise UserError(f"{alexnet}: is not torchvision's AlexNet, whose features.{name} it lacks")
    network.load_state_dict({name: source[name] for name in target})
    own = torch.load(resources.files(torchmetrics) / HEADS, map_location="cpu", weights_only=True)
    return network, [own[f"lin{layer}.model.1.weight"][0] for layer in range(5)]


def _layers(network: nn.Sequential, image: Tensor) -> list[Tensor]:
    """Unit-length features of an image (1, 3, H, W) in [0, 1] after each rectifier: (C, h, w) each."""
    mean, std = (torch.tensor(values).view(3, 1, 1).to(image) for values in SCALING)
    x, found = ((image * 2 - 1) - mean) / std, []
    for module in network:
        x = module(x)
        if isinstance(module, nn.ReLU):
            found.append(F.normalize(x[0], dim=0, eps=1e-8))
    return found


def _distance(first: list[Tensor], second: list[Tensor], heads: list[Tensor]) -> Tensor:
    """Equation 1 of Zhang et al.: squared gaps, weighed by channel, mean over places, sum over layers."""
    layers = zip(first, second, heads, strict=True)
    return torch.stack([((a - b).square() * head.to(a)).sum(0).mean() for a, b, head in layers]).sum()


def _grouped(groups: Sequence[Hashable]) -> list[list[int]]:
    """Rows of each group."""
    rows: dict[Hashable, list[int]] = {}
    for i, group in enumerate(groups):
        rows.setdefault(group, []).append(i)
    return list(rows.values())
