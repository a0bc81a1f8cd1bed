"""The denoising loss under a soft mask (docs/method.md, eq. 5)."""

import torch
from torch import Tensor

EMPTY = 1e-6  # an area below this counts as this: an empty mask gives 0, not 0 / 0


def masked_loss(prediction: Tensor, target: Tensor, mask: Tensor | None = None, normalise: bool = False) -> Tensor:
    """`mean (m (target − prediction))²` (eq. 5): the squared error is weighted by mask².

    Args:
        prediction, target: (B, C, h, w), floating, in the model's own prediction type.
        mask: (B, 1, h, w) in [0, 1]; None weighs every place the same.
        normalise: divide each image's loss by its mask's area (the mean of the mask), so that a small subject weighs
            as much as a large one.

    Returns:
        Scalar, in float32 or wider.
    """
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    error = prediction.to(dtype) - target.to(dtype)
    if mask is None:
        return error.square().mean()
    mask = mask.to(dtype)
    losses = (error * mask).square().mean(dim=(1, 2, 3))  # (B,)
    if normalise:
        losses = losses / mask.mean(dim=(1, 2, 3)).clamp(min=EMPTY)
    return losses.mean()
