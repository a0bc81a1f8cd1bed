"""Which samples a report shows: some chosen at random, and those that a measurement puts first and last."""

from collections.abc import Sequence

import torch
from torch import Tensor

from infusion.metrics.measures import fidelity
from infusion.metrics.run.cache import Rows
from infusion.metrics.run.stages import Group, Stages
from infusion.sampling.pictures import shrunk

SHOWN = 4  # samples of each kind
NETWORKS = ("identity", "dino", "clip")  # the first that there is ranks the samples


def gallery(stages: Stages, group: Group, base: Rows, ours: Rows, photos: Tensor | None) -> dict[str, object]:
    """Samples at random, the same of every concept that has as many, and by likeness the best and the worst.

    Args:
        stages: decodes and measures.
        group: the prompts and seeds of both `base` and `ours`, samples without the concept and with.
        photos: (P, 3, H, W) in [0, 1].

    Returns:
        `ranked_by`: a network, or "" where there is none or no photos; `photos`; `random`, `best` and `worst`: cards
        with prompt (template), seed, score and the pictures `base` and `ours`, (3, h, w) in [0, 1]. Pictures are
        `shrunk`: those of many results are kept.
    """
    network = next((name for name in NETWORKS if getattr(stages.tools, name, None) is not None), "")
    rows = {"random": torch.randperm(len(ours), generator=torch.Generator().manual_seed(0))[:SHOWN].tolist()}
    scores, ranked_by = None, network if photos is not None else ""
    if ranked_by:
        features = stages.tools.backbone(network)(photos).cpu()
        scores = fidelity.pairwise(stages.features(ours, network), features)
        order = scores.argsort(descending=True, stable=True).tolist()
        half = min(SHOWN, -(-len(order) // 2))
        rows |= {"best": order[:half], "worst": order[half:][::-1][:SHOWN]}
    shown = {name: cards(stages, group, own, base, ours, scores) for name, own in rows.items()}
    return {"ranked_by": ranked_by, "photos": None if photos is None else shrunk(photos), **shown}


def cards(
    stages: Stages, group: Group, rows: Sequence[int], base: Rows, ours: Rows, scores: Tensor | None
) -> list[dict[str, object]]:
    """What a report says of some samples."""
    if not rows:
        return []
    theirs, mine = (shrunk(stages.images(one, list(rows))) for one in (base, ours))
    scored = [None] * len(rows) if scores is None else scores[list(rows)].tolist()
    said = zip(group.plain(rows), group.seeds(rows), scored, theirs, mine, strict=True)
    return [
        {"prompt": prompt, "seed": seed, "score": score, "base": without, "ours": having}
        for prompt, seed, score, without, having in said
    ]
