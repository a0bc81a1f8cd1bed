"""What can be measured, and with what: settings, and the names of cases and ratios."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ldm.util.cli import UserError, suggestion

SIZES = ("pocket", "sd15", "sd21")  # names in configs/backbone/
PRECISIONS = ("full", "autocast", "bf16", "fp16")
GROUPS = (  # timed cases; those of a group are measured in turn
    ("guided_step_base", "guided_step_one_concept", "guided_step_eight_concepts"),
    ("unet", "unet_diffusers"),
    ("train_step", "train_step_checkpointing"),
    ("image_50_steps",),
    ("optimiser_10_steps",),
    ("load",),
)
TIMED = tuple(name for group in GROUPS for name in group)
MEMORY = (
    "memory_guided_step",
    "memory_image",
    "memory_train_batch_1",
    "memory_train_batch_1_checkpointing",
    "memory_train_batch_4",
    "memory_train_batch_4_checkpointing",
)
RATIOS = {  # name -> numerator, denominator
    "guided_step_with_concept_vs_base": ("guided_step_one_concept", "guided_step_base"),
    "guided_step_with_8_concepts_vs_one": ("guided_step_eight_concepts", "guided_step_one_concept"),
    "guided_step_with_8_concepts_vs_base": ("guided_step_eight_concepts", "guided_step_base"),
    "unet_vs_diffusers": ("unet", "unet_diffusers"),
    "train_step_with_checkpointing_vs_without": ("train_step_checkpointing", "train_step"),
}


@dataclass(frozen=True)
class Settings:
    """What everything is measured with.

    Attributes:
        device: "cpu" or "cuda", with or without an index.
        size: one of `SIZES`. latent: side of the latents.
        batch: images at a time, before guidance adds its rows.
        precision: "full" is float32; "autocast" keeps float32 weights and computes the UNet in half precision
            (`StableDiffusion.autocast`); "bf16" and "fp16" have the UNet and the text encoder in that type.
        compile: the UNets are compiled (`torch.compile`, static shapes).
        repeats: rounds of measurements.
    """

    device: str = "cpu"
    size: str = "sd15"
    latent: int = 32
    batch: int = 1
    precision: Literal["full", "autocast", "bf16", "fp16"] = "full"
    compile: bool = False
    repeats: int = 5


def choose(only: Sequence[str] | None) -> list[str]:
    """Names of cases in the order of measurement; a ratio stands for both of its sides, None for all but `load`.

    Raises:
        UserError: an unknown name.
    """
    if only is None:
        return [name for name in (*MEMORY, *TIMED) if name != "load"]
    known = [*TIMED, *MEMORY, *RATIOS]
    if unknown := [name for name in only if name not in known]:
        raise UserError(f"--only: there is no case `{unknown[0]}`{suggestion(unknown[0], known)}")
    wanted = {side for name in only for side in RATIOS.get(name, (name,))}
    return [name for name in (*MEMORY, *TIMED) if name in wanted]
