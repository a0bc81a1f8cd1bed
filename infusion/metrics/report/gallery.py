"""Which samples a report shows: those that a measurement puts first and last, each beside the base model's."""

from collections.abc import Sequence

from torch import Tensor

from infusion.metrics.measures import fidelity
from infusion.metrics.run.cache import Rows
from infusion.metrics.run.stages import Group, Stages
from infusion.sampling.pictures import shrunk

SHOWN = 4  # best and worst samples each


def gallery(stages: Stages, group: Group, base: Rows, ours: Rows, photos: Tensor | None) -> dict[str, object]:
    """Best and worst samples, by likeness to the photos, or without photos by the change from the base model's.

    Args:
        stages: decodes and measures.
        group: the prompts and seeds of both `base` and `ours`, samples without the concept and with.
        photos: (P, 3, H, W) in [0, 1].

    Returns:
        `ranked_by`: "clip_i", "change", or "" where there is no CLIP and samples come as they are; `photos`; `best` and
        `worst`: cards with prompt, seed, score and the pictures `base` and `ours`, (3, h, w) in [0, 1]. Pictures are
        `shrunk`: those of many results are kept.
    """
    clip, ranked_by, scores = stages.tools.clip, "", None
    if clip is not None and photos is not None:
        ranked_by, scores = "clip_i", fidelity.pairwise(stages.features(ours, "clip"), clip(photos).cpu())
    elif clip is not None:
        ranked_by, scores = "change", fidelity.drift(*(stages.features(rows, "clip") for rows in (base, ours)))
    if scores is None:
        best, worst = list(range(len(ours)))[: 2 * SHOWN], []
    else:
        order = scores.argsort(descending=ranked_by == "clip_i", stable=True).tolist()
        count = min(SHOWN, max(len(order) // 2, 1))
        best, worst = order[:count], order[count:][::-1][:count]
    shown = {name: cards(stages, group, rows, base, ours, scores) for name, rows in (("best", best), ("worst", worst))}
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
