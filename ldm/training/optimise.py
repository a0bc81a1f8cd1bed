"""The optimiser that all base-model training shares."""

from collections.abc import Iterable

import torch
from torch.nn import Parameter
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR


def adamw(
    parameters: Iterable[Parameter],
    learning_rate: float,
    steps: int,
    warmup: int = 200,
    weight_decay: float = 0.01,
) -> dict:
    """AdamW, in the form that Lightning takes: a linear warm-up, then a cosine to a fiftieth at the last of `steps`."""
    optimizer = torch.optim.AdamW(list(parameters), learning_rate, betas=(0.9, 0.99), weight_decay=weight_decay)
    rise = LinearLR(optimizer, 0.01, total_iters=warmup)
    fall = CosineAnnealingLR(optimizer, max(1, steps - warmup), eta_min=learning_rate / 50)
    schedule = SequentialLR(optimizer, [rise, fall], milestones=[warmup])
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
