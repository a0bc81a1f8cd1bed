"""What a file of tensors is, without loading it: for error messages, readers and `scripts/inspect_file.py`."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from ldm.util.config import backbones, instantiate
from ldm.util.defaults import PAIR
from ldm.weights.diffusers_layout import PARTS, TEXTS, Folder, open_checkpoint, sha256
from ldm.weights.files import CONCEPT, TensorFile
from ldm.weights.names import EMA, PREFIXES, by_prefix, match

File = TensorFile | Folder
Rule = Callable[[File], bool]
TITLES = {"sd15": "SD 1.5", "sd21": "SD 2.1", "sd21_768": "SD 2.1", "sdxl": "SDXL 1.0", "pocket": "pocket"}
LEARNED = "target_output"  # what Infusion's released code calls a residual


@dataclass(frozen=True)
class Kind:
    """What a file is.

    Attributes:
        name: "base checkpoint", "concept", "lora", "textual inversion", "vae", "unet", …, or "unknown".
        says: the same in words, with what to do about it.
        architectures: backbones that have a UNet like this; several where tensors cannot tell them apart.
    """

    name: str
    says: str
    architectures: tuple[str, ...] = ()


def named(pattern: str) -> Rule:
    """Some tensor, or some key at the top of a pickle, has a name that begins as the regular expression says."""
    fits = re.compile(pattern).match
    return lambda file: any(map(fits, [*file.shapes, *map(str, file.content)]))


def scheduler_says(key: str, *values: object) -> Rule:
    """A folder's scheduler has one of these values."""
    return lambda file: isinstance(file, Folder) and file.scheduler.get(key) in values


def any_of(*rules: Rule) -> Rule:
    return lambda file: any(rule(file) for rule in rules)


def unets() -> dict[str, dict[str, Any]]:
    """The arguments of each backbone's UNet."""
    return {name: sd["params"]["unet"]["params"] for name, sd in backbones().items()}


def is_embedding(file: File) -> bool:
    """There are only vectors as wide as text encodings, under names without dots."""
    widths = {768, 1280, *(unet["context_dim"] for unet in unets().values())}
    shapes = [shape for name, shape in file.shapes.items() if "." not in name]
    return 0 < len(shapes) == len(file.shapes) and all(1 <= len(s) <= 2 and s[-1] in widths for s in shapes)


def is_whole(file: File) -> bool:
    """A folder, or a file with UNet, autoencoder and text encoder."""
    starts = (PREFIXES["unet"], PREFIXES["vae"], f"{PREFIXES['text']}|{PAIR}")
    return isinstance(file, Folder) or all(named(start)(file) for start in starts)


def is_list_of_factors(file: File) -> bool:
    """A list of matrices in pairs, each as high as its fellow is wide."""
    shapes = list(file.shapes.values())
    pairs = zip(shapes[::2], shapes[1::2], strict=False)
    alike = all(len(up) == len(down) > 1 and up[1] == down[0] for up, down in pairs)
    return len(shapes) > 1 and len(shapes) % 2 == 0 and all(map(str.isdigit, file.shapes)) and alike


def is_cross_attention(file: File) -> bool:
    """There are only weights of the UNet's cross-attentions, and perhaps a word: Custom Diffusion of its authors."""
    weight = re.compile(rf"{PREFIXES['unet']}.+\.attn2\.(to_[kqv]|to_out\.0)\.(weight|bias)")
    names = file.shapes.keys() - {"embed"}
    return bool(names) and all(map(weight.fullmatch, names))


BASE = "base checkpoint"
ADDED = "a change to a base checkpoint, and no base checkpoint itself; --personalized_ckpt takes it"
EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
LORA = (  # names in LoRAs; behind them what the oldest diffusers, LyCORIS and cloneofsimo have
    r".*(lora_(up|down|A|B)|\.lora|lora_linear_layer|_lora)\.|.*(hada_w|lokr_w)|.+\.(diff|diff_b|dora_scale|alpha)$"
    r"|(unet|text_encoder):"
)
REFUSED: tuple[tuple[str, Rule], ...] = (  # what would load, or nearly, and be something else
    ("CosXL, whose noise levels (EDM) no schedule here has", named("edm_vpred.")),
    (
        "a model with EDM's noise levels, such as Playground 2.5, which no schedule here has",
        any_of(named("edm_mean|edm_std"), scheduler_says("_class_name", *EDM)),
    ),
    (
        "a model with zero terminal SNR (ztsnr), which no schedule here has",
        any_of(named("ztsnr$"), scheduler_says("rescale_betas_zero_snr", True)),
    ),
    (
        "weights of 8 bits with scales of their own: get the file in fp16 or bf16",
        named(r".*(\.scale_weight|\.weight_scale|scaled_fp8)$"),
    ),
    ("SDXL's refiner, which takes no concepts: use the base model", lambda file: signature(file)[2] == 1280),
)
KINDS: tuple[tuple[str, str, Rule], ...] = (  # kind, what it says, what fits it; the first one counts
    (
        "concept",
        "a concept file of this project: pass it as --personalized_ckpt",
        lambda file: file.metadata.get("format") == CONCEPT,
    ),
    (
        "released concept",
        "a concept of Infusion's released code: convert it by scripts/convert_concept.py",
        named(rf"{LEARNED}|.*\.to_v\.{LEARNED}"),
    ),
    (
        "training state",
        "the state of a training, which main.py --resume continues; what it learned is in step=*.safetensors beside it",
        lambda file: named("pytorch-lightning")(file) and not is_whole(file),  # LDM's own checkpoints are such, too
    ),
    (
        "custom diffusion",
        f"Custom Diffusion: {ADDED}",
        any_of(named(r"modifier_token|.*_custom_diffusion\."), is_cross_attention),
    ),
    ("lora", f"a LoRA: {ADDED}", any_of(named(LORA), is_list_of_factors)),
    (
        "textual inversion",
        f"a textual inversion embedding: {ADDED}",
        any_of(named("string_to_param|string_to_token|emb_params|(clip_[lg]|text_encoders_[01]|emb2?)$"), is_embedding),
    ),
    *(("other", says, fits) for says, fits in REFUSED),
    (BASE, "", is_whole),  # which one, `_base` says
    ("controlnet", "a ControlNet", named("control_model.")),
    ("other", "FLUX", named(r"(model\.diffusion_model\.)?double_blocks\.")),
    ("other", "SD 3", named(r"(model\.diffusion_model\.)?joint_blocks\.")),
    (
        "diffusers unet",
        "a diffusers UNet file alone; name the folder of all its parts, or give it as parts.unet",
        named("down_blocks."),
    ),
    ("vae", "a VAE alone; give it as parts.vae", named(rf"encoder\.down(_blocks)?\.|{PREFIXES['vae']}")),
    ("unet", "a UNet alone; give it as parts.unet", named(f"input_blocks.|{PREFIXES['unet']}")),
    ("text encoder", "a text encoder alone; give it as parts.text", named(f"{PREFIXES['text']}|{PAIR}")),
    ("clip", "CLIP's image and text towers, which metrics use", named(r"vision\.")),
    ("text encoder", "a CLIP text encoder alone; give it as parts.text", named("text_model.")),
)


def recognise(file: File) -> Kind:
    """What a file is, by the names and shapes of its tensors and its metadata."""
    for name, says, fits in KINDS:
        if fits(file):
            return _base(file) if name == BASE else Kind(name, says, _alike(signature(file)))
    starts = sorted({name.split(".")[0] for name in file.shapes})
    shown = f"its tensors begin with {', '.join(starts[:5])}" if starts else "it has no tensors"
    return Kind("unknown", f"nothing that is known here; {shown}")


def refusal(file: File) -> str | None:
    """Why a file is no base model here, where its tensors would nevertheless fit or nearly so; None otherwise."""
    return next((f"it is {says}" for says, fits in REFUSED if fits(file)), None)


def guess(file: File) -> str:
    """What a file looks like, as the end of an error message."""
    return f"it looks like {recognise(file).says}"


def _base(file: File) -> Kind:
    inputs, width, context = signature(file)
    if inputs == 9:
        return Kind(BASE, "an inpainting model: 9 input channels, and no backbone here takes them")
    alike = _alike((inputs, width, context))
    if isinstance(file, Folder) and file.prediction_type:
        alike = tuple(name for name in alike if prediction_type(name) == file.prediction_type) or alike
    if not alike:
        found = f"{inputs} input channels, width {width}, text of width {context}"
        return Kind(BASE, f"a base checkpoint that no backbone here fits: {found}")
    uses = [config_name(name) for name in alike]
    if len(uses) > 1:
        uses = [f"{use} if it predicts {_symbol(name)}" for use, name in zip(uses, alike, strict=True)]
    return Kind(BASE, f"{TITLES.get(alike[0], alike[0])}; use {' or '.join(uses)}", alike)


def signature(file: File) -> tuple[int | None, int | None, int | None]:
    """What tells UNets apart: input channels, width of the first layer, width of the text; None where there is none."""
    inputs = width = context = None
    for name, shape in file.shapes.items():
        if name.endswith(("input_blocks.0.0.weight", "conv_in.weight")) and "coder." not in name and len(shape) == 4:
            width, inputs = shape[:2]
        if context is None and name.endswith("attn2.to_k.weight") and len(shape) == 2:
            context = shape[1]
    return inputs, width, context


def _alike(found: tuple[int | None, int | None, int | None]) -> tuple[str, ...]:
    """The backbones of a signature."""
    return tuple(
        name
        for name, unet in unets().items()
        if (unet.get("in_channels", 4), unet["model_channels"], unet["context_dim"]) == found
    )


def config_name(architecture: str) -> str:
    """The config of a backbone, as users name it."""
    return f"configs/backbone/{architecture}.yaml"


def prediction_type(architecture: str) -> str:
    """What a backbone's UNet predicts: "epsilon" or "v_prediction"."""
    return backbones()[architecture]["params"]["schedule"].get("params", {}).get("prediction_type", "epsilon")


def _symbol(architecture: str) -> str:
    size = backbones()[architecture]["params"]["image_size"]
    return f"{'v' if prediction_type(architecture) == 'v_prediction' else 'ε'} (trained at {size} pixels)"


def inspect(path: str | Path) -> dict[str, Any]:
    """What a file or a diffusers folder holds, as values for JSON. No model gets values.

    Returns:
        `file`, `format`, `bytes`, `sha256`, `kind`, `says`, `tensors`, `parameters`, `dtypes`, `metadata`. For a base
        checkpoint also `architecture` (the first of those in `configs`, which its tensors all fit), `prediction_type`
        and where that is known from, `has_ema`, `components`, and against the architecture `missing`, `wrong_shapes`
        and `unexpected`.

    Raises:
        ValueError: nothing is there, or it cannot be read safely.
    """
    with open_checkpoint(path) as file:
        kind = recognise(file)
        paths = [part.path for part in file.files.values()] if isinstance(file, Folder) else [file.path]
        facts: dict[str, Any] = {
            "file": str(path),
            "format": file.format,
            "bytes": sum(path.stat().st_size for path in paths),
            "sha256": sha256(path),
            "kind": kind.name,
            "says": kind.says,
            "tensors": len(file.shapes),
            "parameters": sum(map(prod, file.shapes.values())),
            "dtypes": dict(Counter(str(dtype).removeprefix("torch.") for dtype in file.dtypes.values())),
            "metadata": file.metadata,
        }
        return facts | (_base_facts(file, kind) if kind.name == BASE else {})


def _base_facts(file: File, kind: Kind) -> dict[str, Any]:
    known, source = stated_prediction(file)
    types = {prediction_type(name) for name in kind.architectures}
    if known is None and len(types) == 1:
        known, source = types.pop(), config_name(kind.architectures[0])
    starts = PREFIXES | {"text": (PREFIXES["text"], PAIR)}
    if isinstance(file, Folder):
        starts = {name: f"{part}/" for name, part in PARTS.items()} | {"text": tuple(f"{text}/" for text in TEXTS)}
    facts: dict[str, Any] = {
        "architecture": kind.architectures[0] if kind.architectures else None,
        "configs": [config_name(name) for name in kind.architectures],
        "prediction_type": known or "unknown",
        "prediction_type_from": source,
        "has_ema": named(EMA)(file),
        "components": {
            component: sum(prod(shape) for name, shape in file.shapes.items() if name.startswith(start))
            for component, start in starts.items()
        },
    }
    if kind.architectures:
        with torch.device("meta"):
            sd = instantiate(backbones()[kind.architectures[0]], "sd")
        found = match(file, by_prefix(dict(sd.named_children())))
        facts |= {"missing": found.missing, "wrong_shapes": found.wrong, "unexpected": found.unexpected}
    return facts


def stated_prediction(file: File) -> tuple[str, str] | tuple[None, None]:
    """What a file says that its UNet predicts, and where; None where it does not: tensors are the same for both."""
    if isinstance(file, Folder) and file.prediction_type:
        return file.prediction_type, "scheduler/scheduler_config.json"
    if "v_pred" in file.shapes:
        return "v_prediction", "the key v_pred"
    for key in ("modelspec.prediction_type", "modelspec.predict_key", "modelspec.architecture"):
        value = file.metadata.get(key, "")
        if value in ("epsilon", "v") or value.endswith("-768-v"):
            return "epsilon" if value == "epsilon" else "v_prediction", f"metadata {key}"
        if value in backbones():
            return prediction_type(value), f"metadata {key}"
    return None, None
