"""The optimiser that all base-model training shares."""

from collections.abc import Iterable

import torch
from torch.nn import Parameter
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR


def adamw(
    parameters: Iterable[Parameter],
    learning_rate: float,
    steps: int | None = None,
    warmup: int = 200,
    weight_decay: float = 0.01,
) -> dict:
    """AdamW with a linear warm-up, in the form that Lightning takes.

    With `steps` a cosine falls to a fiftieth of the learning rate over them; without, the rate stays, and a run can be
    lengthened.
    """
    optimizer = torch.optim.AdamW(list(parameters), learning_rate, betas=(0.9, 0.99), weight_decay=weight_decay)
    rise = LinearLR(optimizer, 0.01, total_iters=warmup)
    schedule = rise
    if steps is not None:
        fall = CosineAnnealingLR(optimizer, max(1, steps - warmup), eta_min=learning_rate / 50)
        schedule = SequentialLR(optimizer, [rise, fall], milestones=[warmup])
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
