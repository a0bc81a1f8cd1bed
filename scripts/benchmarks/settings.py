"""What can be measured, and with what: settings, and the names of cases and ratios."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ldm.util.cli import UserError, suggestion

SIZES = ("pocket", "sd15", "sd21")
PRECISIONS = ("full", "autocast", "bf16", "fp16")

STEPS, OPTIMISER_STEPS = 50, 10  # of one measurement of the cases of many steps
IMAGE, OPTIMISER = f"image_{STEPS}_steps", f"optimiser_{OPTIMISER_STEPS}_steps"
GUIDED = ("guided_step_base", "guided_step_one_concept", "guided_step_eight_concepts")
PEERS = ("unet", "unet_diffusers")
TRAIN = ("train_step", "train_step_released_design")
TIMED = (*GUIDED, *PEERS, *TRAIN, IMAGE, OPTIMISER)

SAMPLING_MEANS = (  # the first is what the others are held against
    "guided_step_usual", "guided_step_in_two_calls", "guided_step_channels_last", "guided_step_kept_keys_and_values",
)  # fmt: skip
TRAINING_MEANS = (
    "train_step_usual", "train_step_encoding_each_step", "train_step_checkpointing", "train_step_foundation_ends_early",
    "train_step_fused_optimiser",
)  # fmt: skip
MEANS = (*SAMPLING_MEANS, *TRAINING_MEANS)  # measured where they are asked for

MEMORY_TRAINING = {  # name -> batch, gradient checkpointing
    "memory_train_batch_1": (1, False),
    "memory_train_batch_1_checkpointing": (1, True),
    "memory_train_batch_4": (4, False),
    "memory_train_batch_4_checkpointing": (4, True),
}
MEMORY = ("memory_guided_step", "memory_image", *MEMORY_TRAINING)

RATIOS = {  # name -> numerator, denominator
    "guided_step_with_concept_vs_base": ("guided_step_one_concept", "guided_step_base"),
    "guided_step_with_8_concepts_vs_one": ("guided_step_eight_concepts", "guided_step_one_concept"),
    "guided_step_with_8_concepts_vs_base": ("guided_step_eight_concepts", "guided_step_base"),
    "unet_vs_diffusers": PEERS,
    "train_step_vs_released_design": TRAIN,
}
RATIOS_OF_MEANS = {
    f"{name}_vs_usual": (name, usual) for usual, *names in (SAMPLING_MEANS, TRAINING_MEANS) for name in names
}


@dataclass(frozen=True)
class Settings:
    """What everything is measured with.

    Attributes:
        device: "cpu" or "cuda", with or without an index.
        size: architecture, a name in `configs/backbone/`.
        latent: side of the latents.
        batch: images at a time, before guidance adds its rows.
        precision: "full" is float32; "autocast" keeps float32 weights and computes the UNet in half precision
            (`StableDiffusion.autocast`); "bf16" and "fp16" have the UNet and the text encoder in that type. The
            autoencoder stays in float32, as it does when a checkpoint is loaded.
        compile: the UNets are compiled (`torch.compile`, static shapes).
        repeats: rounds of measurements.
    """

    device: str = "cpu"
    size: Literal["pocket", "sd15", "sd21"] = "sd15"
    latent: int = 32
    batch: int = 1
    precision: Literal["full", "autocast", "bf16", "fp16"] = "full"
    compile: bool = False
    repeats: int = 5


def choose(only: Sequence[str] | None, compiled: bool = False) -> list[str]:
    """Names of cases in the order of measurement; a ratio stands for both of its sides, None for all but the means.

    Raises:
        UserError: an unknown name; `compiled`, and nothing is compiled.
    """
    pairs = RATIOS | RATIOS_OF_MEANS
    known = [*TIMED, *MEMORY, *MEANS, *pairs, "means"]
    if only is None:
        return [*MEMORY, *TIMED]
    if unknown := [name for name in only if name not in known]:
        raise UserError(f"--only: there is no case `{unknown[0]}`{suggestion(unknown[0], known)}")
    named = [name for one in only for name in (RATIOS_OF_MEANS if one == "means" else (one,))]
    wanted = {side for name in named for side in pairs.get(name, (name,))}
    if compiled and not wanted & {*TIMED, *MEANS}:
        raise UserError("--compile: memory is measured without it; leave it out, or time something")
    return [name for name in (*MEMORY, *TIMED, *MEANS) if name in wanted]
