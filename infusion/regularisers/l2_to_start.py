"""The distance from the base model: λ ‖θ − θ₀‖² (Preserve and Personalize, 2025, arXiv 2505.19519).

From the paper: the sum of squares over the fine-tuned weights, without images of the superclass. Our reading: of a
low-rank change it is the change that counts, ‖(α / r) B A‖², not its factors; words, and what else is no weight, count
by their own distance from the start. Of `outputs` (T-LoRA) the factors count.
"""

import torch
from torch import Tensor

from infusion.methods.base import Method, Tensors
from infusion.regularisers.base import Regulariser, Step
from infusion.tokens import Word
from ldm.pipeline import StableDiffusion


class L2ToStart(Regulariser):
    """‖θ − θ₀‖², summed over all that is learned."""

    def start(self, sd: StableDiffusion, method: Method, tensors: Tensors, word: Word) -> None:
        changed = {id(part) for change in method.differences(tensors).values() for part in change.parameters()}
        learned = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
        self.starts = {name: t.detach().clone() for name, t in learned.items() if id(t) not in changed}

    def term(self, sd: StableDiffusion, method: Method, tensors: Tensors, step: Step) -> Tensor:
        squares = [(tensors[name] - start.to(tensors[name])).square().sum() for name, start in self.starts.items()]
        for change in method.differences(tensors).values():
            zero = torch.zeros((), device=next(change.parameters()).device).expand(change.shape)
            squares.append(change(zero).square().sum())
        return torch.stack(squares).sum()
