"""T-LoRA: a LoRA of fewer directions the more noise there is (Soboleva et al. 2025, arXiv 2507.05964).

From the paper and the authors' code: the schedule of the rank; the change `B M_t S A − B₀ M_t S₀ A₀`, so that the
start is the base model; A₀, S₀ and B₀ are the last singular vectors and values of a random matrix. Ours: each row of a
batch has the rank of its own timestep (the authors' code takes one timestep for a batch, and trains on batches of one);
and the vectors come from two QR decompositions and the values from one matrix of each shape, which is as random (a
Gaussian matrix's singular vectors are uniformly distributed) and needs no large SVD for each layer.
"""

import torch
from torch import Tensor, nn

from infusion.deltas import as_parameter
from infusion.methods.base import Tensors
from infusion.methods.lora import DOWN, UP, LoRA
from infusion.tokens import Word
from ldm.pipeline import StableDiffusion
from ldm.util.cli import UserError, check_range

SCALE, START = ".scale", ".start"  # S; before the start's A₀, S₀ and B₀
PARTS = (DOWN, SCALE, UP)
T = 1000  # timesteps, as all Stable Diffusions have


class TLoRA(LoRA):
    """Diagonally scaled low-rank changes B M_t S A of the UNet's attentions, masked by timestep t of T.

    `r(t) = ⌊((T − t) / T)^a (r − r_min)⌋ + r_min` directions act, r at t = 0 and r_min at t = T, in training and in
    sampling alike.

    Args:
        rank, identifier, seed, self_attention: as of LoRA.
        min_rank: r_min. exponent: a.

    Raises:
        ValueError: a number out of range; gradient checkpointing, which recomputes layers without their timesteps.
    """

    name = "t_lora"

    def __init__(
        self,
        rank: int = 64,
        min_rank: int = 32,
        exponent: float = 1.0,
        identifier: str = "sks",
        seed: int = 0,
        self_attention: bool = True,
    ) -> None:
        super().__init__(rank, None, identifier, seed, self_attention)
        check_range("min_rank", min_rank, 1, rank)
        check_range("exponent", exponent, 0)
        self.min_rank, self.exponent = min_rank, exponent
        self.options = {"rank": rank, "min_rank": min_rank, "exponent": exponent, "identifier": identifier}

    def start(self, sd: StableDiffusion, word: Word) -> dict[str, nn.Parameter]:
        if sd.unet.checkpoint:
            raise UserError("checkpoint: T-LoRA trains without it: set the UNet's checkpoint: false")
        generator, learned = torch.Generator().manual_seed(self.seed), {}

        def gaussian(rows: int, columns: int) -> Tensor:
            return torch.empty(rows, columns, device="cpu").normal_(std=1 / self.rank, generator=generator)

        shapes, values = self.shapes(sd), {}
        for name, (out, width) in shapes.items():
            if (out, width) not in values:
                values[out, width] = torch.linalg.svdvals(gaussian(out, width))[-self.rank :]
            left, right = (torch.linalg.qr(gaussian(size, self.rank)).Q for size in (out, width))
            for part, tensor in zip(PARTS, (right.mT, values[out, width], left), strict=True):
                learned[f"{name}{part}"] = nn.Parameter(tensor.contiguous().clone())
                learned[f"{name}{START}{part}"] = nn.Parameter(tensor.contiguous(), requires_grad=False)
        return learned

    def differences(self, tensors: Tensors, strength: float = 1.0) -> dict[str, nn.Module]:
        return {}

    def outputs(self, tensors: Tensors, strength: float = 1.0) -> dict[str, nn.Module]:
        """Raises ValueError for a layer that lacks one of its tensors."""
        found = {}
        try:
            for name in dict.fromkeys(name.partition(".weight.")[0] for name in tensors):
                own = [[tensors[f"{name}.weight{start}{part}"] for part in PARTS] for start in ("", START)]
                found[name] = TimedLowRank(self, *own, strength)
        except KeyError as error:
            raise UserError(f"the concept lacks {error}") from error
        return found

    def ranks(self, timesteps: Tensor) -> Tensor:
        """r(t): int64 of the timesteps' shape."""
        share = ((T - timesteps.double()) / T) ** self.exponent
        return (share * (self.rank - self.min_rank)).floor().long() + self.min_rank


class TimedLowRank(nn.Module):
    """A layer's output plus `s (B M_t S A − B₀ M_t S₀ A₀) x`.

    Args:
        method: says the ranks.
        learned, start: A, S and B, of the shapes (r, in), (r,) and (out, r); see `infusion.deltas.as_parameter`.
        strength: s.
    """

    def __init__(self, method: TLoRA, learned: list[Tensor], start: list[Tensor], strength: float) -> None:
        super().__init__()
        for down, scale, up in (learned, start):
            if down.ndim != 2 or up.ndim != 2 or not len(down) == len(scale) == up.shape[1] == method.rank:
                raise UserError(f"A is {tuple(down.shape)} and B is {tuple(up.shape)}: not of rank {method.rank}")
        self.method, self.strength = method, strength
        self.learned, self.start = (nn.ParameterList(map(as_parameter, own)) for own in (learned, start))

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.learned[2]), self.learned[0].shape[1]))

    def forward(self, x: Tensor, output: Tensor, timesteps: Tensor) -> Tensor:
        ranks = self.method.ranks(timesteps)  # (B,)
        mask = torch.arange(self.method.rank, device=x.device) < ranks[:, None, None]  # (B, 1, r)
        added, removed = (
            ((x.to(down.dtype) @ down.mT) * scale * mask) @ up.mT for down, scale, up in (self.learned, self.start)
        )
        return output + (self.strength * (added - removed)).to(output.dtype)
