"""What a file of tensors is, by its tensors' names and shapes: for error messages and `scripts/inspect_file.py`."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ldm.util.config import backbones
from ldm.weights.diffusers_layout import Folder
from ldm.weights.files import TensorFile
from ldm.weights.names import PREFIXES

TITLES = {"sd15": "SD 1.5", "sd21": "SD 2.1", "sd21_768": "SD 2.1", "pocket": "pocket"}
CONCEPT = "infusion-concept"  # `format` in the metadata of `infusion.concepts.concept`
LEARNED = "target_output"  # what the paper's released code calls a residual (`infusion.concepts.released`)
LORA = ("lora_up.", "lora_down.", "lora_A.", "lora_B.", ".lora.", "lora_linear_layer.")
# what the names of a file's tensors begin with -> what it is
OTHERS = {
    "control_model.": ("controlnet", "a ControlNet"),
    "double_blocks.": ("other", "FLUX"),
    "model.diffusion_model.double_blocks.": ("other", "FLUX"),
    "joint_blocks.": ("other", "SD 3"),
    "model.diffusion_model.joint_blocks.": ("other", "SD 3"),
    "down_blocks.": ("diffusers unet", "a diffusers UNet file alone; name the folder that holds unet/, vae/ and "
                     "text_encoder/, or give it as parts.unet"),
    "encoder.down_blocks.": ("vae", "a VAE alone (diffusers); give it as parts.vae"),
    "encoder.down.": ("vae", "a VAE alone; give it as parts.vae"),
    "input_blocks.": ("unet", "a UNet alone; give it as parts.unet"),
    PREFIXES["unet"]: ("unet", "a UNet alone; give it as parts.unet"),
    PREFIXES["vae"]: ("vae", "a VAE alone; give it as parts.vae"),
    PREFIXES["text"]: ("text encoder", "a text encoder alone; give it as parts.text"),
    "vision.": ("clip", "CLIP's image and text towers, which metrics use"),
    "text_model.": ("text encoder", "a CLIP text encoder alone; give it as parts.text"),
}  # fmt: skip


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


def guess(file: TensorFile | Folder) -> str:
    """What a file looks like, as the end of an error message."""
    return f"it looks like {recognise(file).says}"


def recognise(file: TensorFile | Folder) -> Kind:
    """What a file is, by the names and shapes of its tensors and its metadata."""
    shapes = file.shapes
    if file.metadata.get("format") == CONCEPT:
        return Kind("concept", "a concept file of this project: pass it as --personalized_ckpt")
    if LEARNED in file.content or any(name.endswith(f".to_v.{LEARNED}") for name in shapes):
        return Kind(
            "released concept", "a concept of Infusion's released code: convert it by scripts/convert_concept.py"
        )
    if any(part in name for name in shapes for part in LORA):
        return Kind("lora", "a LoRA: a change to a base checkpoint, and none itself")
    if {"string_to_param", "string_to_token"} & file.content.keys() or "emb_params" in shapes or _embeddings(shapes):
        return Kind("textual inversion", "a textual inversion embedding: a word for a base checkpoint, and none itself")
    whole = all(any(name.startswith(prefix) for name in shapes) for prefix in PREFIXES.values())
    if any(name.startswith("conditioner.embedders.") for name in shapes) or _signature(shapes)[2] in (1280, 2048):
        return Kind("other", "SDXL, which is not supported")
    if isinstance(file, Folder) or whole:
        return _base(file)
    for start, (name, says) in OTHERS.items():
        if any(tensor.startswith(start) for tensor in shapes):
            return Kind(name, says, _alike(_signature(shapes)))
    if any(str(key).startswith("pytorch-lightning") for key in file.content):
        return Kind("training state", "a training state of Lightning, not a base checkpoint")
    starts = sorted({name.split(".")[0] for name in shapes})
    shown = f"its tensors begin with {', '.join(starts[:5])}" if starts else "it has no tensors"
    return Kind("unknown", f"nothing that is known here; {shown}")


def config_name(architecture: str) -> str:
    """The config of a backbone, as users name it."""
    return f"configs/backbone/{architecture}.yaml"


def _base(file: TensorFile | Folder) -> Kind:
    inputs, width, context = _signature(file.shapes)
    if inputs == 9:
        return Kind("base checkpoint", "an inpainting model: 9 input channels, and no backbone here takes them")
    alike = _alike((inputs, width, context))
    if isinstance(file, Folder) and file.prediction_type:
        alike = tuple(name for name in alike if prediction_type(name) == file.prediction_type) or alike
    if not alike:
        found = f"{inputs} input channels, width {width}, text of width {context}"
        return Kind("base checkpoint", f"a base checkpoint that no backbone here fits: {found}")
    uses = [config_name(name) for name in alike]
    if len(uses) > 1:
        uses = [f"{use} if it predicts {_symbol(name)}" for use, name in zip(uses, alike, strict=True)]
    return Kind("base checkpoint", f"{TITLES.get(alike[0], alike[0])}; use {' or '.join(uses)}", alike)


def prediction_type(architecture: str) -> str:
    """What a backbone's UNet predicts: "epsilon" or "v_prediction"."""
    return backbones()[architecture]["params"]["schedule"].get("params", {}).get("prediction_type", "epsilon")


def _symbol(architecture: str) -> str:
    size = backbones()[architecture]["params"]["image_size"]
    return f"{'v' if prediction_type(architecture) == 'v_prediction' else 'ε'} (trained at {size} pixels)"


def _signature(shapes: dict[str, tuple[int, ...]]) -> tuple[int | None, int | None, int | None]:
    """What tells UNets apart: input channels, width of the first layer, width of the text; None where there is none."""
    first = _first(shapes, ("input_blocks.0.0.weight", "conv_in.weight"), ("encoder.", "decoder."))
    keys = _first(shapes, ("attn2.to_k.weight",), ())
    return (first[1] if len(first) == 4 else None, first[0] if first else None, keys[1] if len(keys) == 2 else None)


def _first(shapes: dict[str, tuple[int, ...]], ends: tuple[str, ...], without: Iterable[str]) -> tuple[int, ...]:
    found = (
        shape for name, shape in shapes.items() if name.endswith(ends) and not any(part in name for part in without)
    )
    return next(found, ())


def _alike(signature: tuple[int | None, int | None, int | None]) -> tuple[str, ...]:
    def own(sd: dict[str, Any]) -> tuple[int, int, int]:
        unet = sd["params"]["unet"]["params"]
        return unet.get("in_channels", 4), unet["model_channels"], unet["context_dim"]

    return tuple(name for name, sd in backbones().items() if own(sd) == signature)


def _embeddings(shapes: dict[str, tuple[int, ...]]) -> bool:
    """Whether there are only a few vectors as wide as text encodings, under names without dots."""
    return 0 < len(shapes) <= 2 and all(
        "." not in name and 1 <= len(shape) <= 2 and shape[-1] in (768, 1024, 1280) for name, shape in shapes.items()
    )
