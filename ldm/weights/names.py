"""Which tensors of a file are those of a module: LDM's names, averaged weights, and diffusers' names."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from ldm.models.autoencoder import AutoencoderKL
from ldm.models.text import ClipText, OpenClipText, TextPair
from ldm.models.unet import UNet
from ldm.util.cli import UserError
from ldm.util.defaults import PAIR, PREFIXES
from ldm.weights.diffusers_layout import (
    PARTS,
    Folder,
    canonical,
    diffusers_names,
    folders_of,
    transposes,
    unrun,
)
from ldm.weights.files import TensorFile

EMA = "model_ema."
SCHEDULE = {  # buffers of LDM's noise schedule; `ldm.diffusion.schedule` computes its own
    *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
    *("log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "logvar"),
    *("posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
    "lvlb_weights",
}
CLASSES = {"unet": UNet, "vae": AutoencoderKL, "text": ClipText | OpenClipText}
CONSTANTS = ("embeddings.position_ids", ".model.attn_mask")  # of old files


def ignored(name: str) -> bool:
    """Whether a tensor is nothing that a module would hold: a constant, a table of the schedule, or an average."""
    return name in SCHEDULE or name.endswith(CONSTANTS) or name.startswith(EMA)


def prefix_of(component: str, module: nn.Module) -> str:
    """What the names of a component's tensors begin with in a checkpoint."""
    return PAIR if isinstance(module, TextPair) else PREFIXES[component]


def by_prefix(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """What the names in a checkpoint begin with -> module, of a model's components (unet, vae, text)."""
    return {prefix_of(component, modules[component]): modules[component] for component in PREFIXES}


def ema_name(name: str) -> str:
    """LDM's name for the average of the UNet's tensor `name`: without any dots of its own."""
    return EMA + f"diffusion_model.{name}".replace(".", "")


@dataclass(frozen=True)
class Match:
    """How a file and modules fit together.

    Attributes:
        sources: prefix -> tensor of the module -> names in the file of the tensors that are, one below the other,
            that tensor; none where the file lacks one that the module never runs.
        expected: how many tensors the modules have.
        missing: names that the file lacks.
        wrong: what has another shape, in words.
        unexpected: sorted names in the file that no module has and that are not `ignored`.
    """

    sources: dict[str, dict[str, tuple[str, ...]]]
    expected: int
    missing: list[str]
    wrong: list[str]
    unexpected: list[str]


def match(file: TensorFile | Folder, modules: Mapping[str, nn.Module], use_ema: bool = False) -> Match:
    """Find the modules' tensors in a file; see `ldm.weights.checkpoint.load_into`."""
    sources, missing, wrong = {}, [], []
    for prefix, module in modules.items():
        names, optional = _names(file, prefix, module, use_ema), unrun(module)
        sources[prefix] = {}
        for name, tensor in module.state_dict().items():
            stored = names.get(name, ())
            lacking = [part for part in stored if part not in file.shapes]
            if (lacking or not stored) and name in optional:
                stored = ()
            elif lacking:
                missing += lacking
            elif not _fits(
                shapes := [file.shapes[part] for part in stored],
                tuple(tensor.shape)[:: -1 if transposes(name, stored) else 1],
            ):
                found = " + ".join(str(shape) for shape in shapes)
                wrong.append(f"{stored[0]} {found} instead of {tuple(tensor.shape)}")
            sources[prefix][name] = stored
    known = {part for names in sources.values() for stored in names.values() for part in stored}
    if use_ema:  # the weights that the averages take the place of
        known |= {PREFIXES["unet"] + name for name in sources.get(PREFIXES["unet"], {})}
    unexpected = sorted(name for name in file.shapes if name not in known and not ignored(name))
    return Match(sources, sum(map(len, sources.values())), missing, wrong, unexpected)


def _names(file: TensorFile | Folder, prefix: str, module: nn.Module, use_ema: bool) -> dict[str, tuple[str, ...]]:
    """For every tensor of a module that the file's layout has, its names there, whether they are there or not."""
    state = module.state_dict()
    if isinstance(file, Folder):
        component = next((c for c in PREFIXES if prefix_of(c, module) == prefix), None)
        if component is None:
            raise UserError(f"{file.path}: a diffusers folder has no part {prefix}*")
        return {
            start + name: tuple(f"{folder}/{n}" for n in stored)
            for folder, (start, part) in folders_of(component, module).items()
            for name, stored in diffusers_names(part).items()
        }
    if use_ema and prefix == PREFIXES["unet"]:
        return {name: (ema_name(name),) for name in state}
    names = {name: (_own_name(prefix + name, file),) for name in state}
    kind = next((PARTS[component] for component, cls in CLASSES.items() if isinstance(module, cls)), None)
    if prefix or kind is None:
        return names
    actual = {canonical(kind, name): name for name in file.shapes}  # perhaps one part alone, out of a diffusers folder
    others = {name: tuple(actual.get(n, n) for n in stored) for name, stored in diffusers_names(module).items()}
    return max(names, others, key=lambda names: sum(n in file.shapes for stored in names.values() for n in stored))


def _own_name(name: str, file: TensorFile) -> str:
    """The name in the file: transformers from 5.6 writes CLIP's text tower without the level `text_model`, and some
    SDXL files have the projection as transformers has it."""
    others = (name.replace("transformer.text_model.", "transformer.", 1), f"{name}.weight")
    return next((other for other in (name, *others) if other in file.shapes), name)


def _fits(shapes: list[tuple[int, ...]], wanted: tuple[int, ...]) -> bool:
    """Whether tensors of these shapes, one below the other, are one of the wanted shape; a linear layer is a 1×1
    convolution."""
    shape = (sum(s[0] for s in shapes), *shapes[0][1:]) if len(shapes) > 1 else shapes[0]
    alike = len({s[1:] for s in shapes}) == 1
    return alike and wanted in (shape, (*shape, 1, 1)) or (alike and shape == (*wanted, 1, 1))
