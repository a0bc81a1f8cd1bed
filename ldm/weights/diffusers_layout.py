"""How diffusers and transformers name the tensors of this project's modules, by the modules' own structure.

A diffusers folder holds each part in a folder of its own: `unet`, `vae`, `text_encoder`, and SDXL's `text_encoder_2`.
The order of blocks is the same as in LDM; diffusers counts them by level, and the decoder's levels from the coarsest.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.models.attention import SpatialTransformer
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.text import ClipText, OpenClipText, TextPair
from ldm.models.unet import Downsample, ResBlock, UNet, Upsample
from ldm.util import digests
from ldm.util.cli import UserError
from ldm.weights.files import TensorFile

PARTS = {"unet": "unet", "vae": "vae", "text": "text_encoder"}  # component of StableDiffusion -> its folder
TEXTS = ("text_encoder", "text_encoder_2")  # folders of SDXL's two
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")  # of files of weights in it, best first
ENDINGS = (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin")
RESBLOCK = {
    **{"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj"},
    **{"out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut"},
}
VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
VAE_OF_OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
CLIP_LAYER = {
    **{"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj"},
    **{"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"},
}
CLIP_ENDS = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
    "text_projection": "text_projection.weight",  # transposed, see `transposes`
}


class Folder(AbstractContextManager):
    """The tensors of a diffusers folder, as `ldm.weights.files.TensorFile`; those of `unet/` are named `unet/…`.

    Attributes:
        path: the folder.
        files: the part's folder ("unet", "vae", "text_encoder", …) -> its file of weights; a part may be missing.
        shapes, dtypes: of every tensor, by name (`canonical`).
        scheduler: the scheduler's settings; {} where the folder has none.
        prediction_type: "epsilon" or "v_prediction", as the folder's scheduler has it; None where it does not say.

    Raises:
        ValueError: the folder has none of the parts, or one of its files cannot be read safely.
    """

    format = "folder"

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metadata: dict[str, str] = {}
        self.content: dict[str, object] = {}
        paths = {part: _weights(self.path / part) for part in (*PARTS.values(), TEXTS[1])}
        if not any(paths.values()):
            raise UserError(f"{path}: no diffusers folder: there are no weights in {', '.join(PARTS.values())}")
        with ExitStack() as stack:
            self.files = {part: stack.enter_context(TensorFile(file)) for part, file in paths.items() if file}
            self.scheduler = _scheduler(self.path / "scheduler" / "scheduler_config.json")
            self.prediction_type = self.scheduler.get("prediction_type")
            self._stack = stack.pop_all()
        self._places = {
            f"{part}/{canonical(part, name)}": (file, name) for part, file in self.files.items() for name in file.shapes
        }
        self.shapes = {name: file.shapes[stored] for name, (file, stored) in self._places.items()}
        self.dtypes: dict[str, torch.dtype] = {n: file.dtypes[stored] for n, (file, stored) in self._places.items()}

    def read(self, name: str) -> Tensor:
        """The tensor of that name, on the CPU, as stored."""
        file, stored = self._places[name]
        return file.read(stored)

    def __exit__(self, *error: object) -> None:
        self._stack.close()


def open_checkpoint(path: str | Path) -> TensorFile | Folder:
    """A file of tensors or a diffusers folder, whichever is there; a context manager.

    Raises:
        ValueError: nothing is there, or it cannot be read safely.
    """
    return Folder(path) if Path(path).is_dir() else TensorFile(path)


def sha256(path: str | Path) -> str:
    """A file's SHA-256, in lowercase hexadecimal; a diffusers folder's is that of its parts' digests, one a line."""
    if Path(path).is_dir():
        with Folder(path) as folder:
            parts = [digests.sha256(folder.files[part].path) for part in sorted(folder.files)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return digests.sha256(path)


def canonical(folder: str, name: str) -> str:
    """A stored tensor's name as the newest diffusers writes the autoencoder's, and transformers from 5.6 CLIP's."""
    if folder == "vae":
        match = re.fullmatch(r"(.*mid_block\.attentions\.0\.)(query|key|value|proj_attn)(\..*)", name)
        return match[1] + VAE_OF_OLD[match[2]] + match[3] if match else name
    return name.removeprefix("text_model.") if folder in TEXTS else name


def diffusers_names(module: nn.Module) -> dict[str, tuple[str, ...]]:
    """For every tensor of a module, the names (`canonical`) of those that are, one below the other, that tensor.

    Tensors that diffusers does not store are left out: `unrun` ones.

    Raises:
        TypeError: neither a UNet, nor an autoencoder, nor one text encoder.
    """
    names = list(module.state_dict())
    match module:
        case UNet():
            pairs = [(ours, theirs) for ours, theirs in _unet(module) for ours, theirs in _expand(module, ours, theirs)]
            return {ours: (theirs,) for ours, theirs in pairs}
        case AutoencoderKL():
            return {name: (_vae(name, len(module.decoder.up)),) for name in names}
        case ClipText():
            return {name: (name.removeprefix("transformer.text_model."),) for name in names}
        case OpenClipText():
            unused = unrun(module)
            return {name: _openclip(name.removeprefix("model.")) for name in names if name not in unused}
    raise TypeError(f"diffusers has no names for a {type(module).__name__}")


def folders_of(component: str, module: nn.Module) -> dict[str, tuple[str, nn.Module]]:
    """The folders of a component of `StableDiffusion`: name -> what its tensors' names begin with here, and whose."""
    if isinstance(module, TextPair):
        own = zip(TEXTS, module.embedders, strict=True)
        return {folder: (f"embedders.{i}.", text) for i, (folder, text) in enumerate(own)}
    return {PARTS[component]: ("", module)}


def transposes(ours: str, theirs: tuple[str, ...]) -> bool:
    """Whether a tensor is stored transposed: OpenCLIP's projection is a matrix, transformers' a linear layer."""
    return ours.endswith("model.text_projection") and theirs[0].endswith(".weight")


def unrun(module: nn.Module) -> frozenset[str]:
    """Tensors that a module has and never uses, so that a file may lack them: of OpenCLIP, what follows the layer whose
    output is taken, and `logit_scale`. diffusers stores none of them, nor do single files made from its folders."""
    if isinstance(module, TextPair):
        return frozenset(f"embedders.1.{name}" for name in unrun(module.embedders[1]))
    if not isinstance(module, OpenClipText):
        return frozenset()
    blocks = len(module.model.transformer.resblocks)
    unused = [f"model.transformer.resblocks.{i}." for i in range(blocks - module.skip, blocks)]
    unused = ("model.logit_scale",) if module.pools else ("model.logit_scale", "model.text_projection", *unused)
    return frozenset(name for name in module.state_dict() if name.startswith(unused))


def _expand(module: nn.Module, ours: str, theirs: str) -> Iterator[tuple[str, str]]:
    """Names of the tensors of a submodule, from the submodule's own two names."""
    for rest in module.get_submodule(ours).state_dict():
        yield f"{ours}.{rest}", f"{theirs}.{rest}"


def _unet(unet: UNet) -> Iterator[tuple[str, str]]:
    """Pairs of submodules, this project's and diffusers', whose tensors have the same names."""
    yield "time_embed.0", "time_embedding.linear_1"
    yield "time_embed.2", "time_embedding.linear_2"
    if unet.label_emb is not None:
        yield "label_emb.0.0", "add_embedding.linear_1"
        yield "label_emb.0.2", "add_embedding.linear_2"
    yield "input_blocks.0.0", "conv_in"
    yield "out.0", "conv_norm_out"
    yield "out.2", "conv_out"
    blocks = [("mid_block", "middle_block", list(unet.middle_block))]
    for side, ours in (("down_blocks", "input_blocks"), ("up_blocks", "output_blocks")):
        level = 0
        for i, block in enumerate(getattr(unet, ours)):
            if side == "up_blocks" or i > 0:  # the way down begins with `conv_in`
                blocks.append((f"{side}.{level}", f"{ours}.{i}", list(block)))
                level += isinstance(block[-1], Downsample | Upsample)
    counts: dict[str, int] = {}
    for theirs, ours, layers in blocks:
        for i, layer in enumerate(layers):
            if isinstance(layer, Downsample):
                yield f"{ours}.{i}.op", f"{theirs}.downsamplers.0.conv"
            elif isinstance(layer, Upsample):
                yield f"{ours}.{i}.conv", f"{theirs}.upsamplers.0.conv"
            else:
                kind = f"{theirs}.attentions" if isinstance(layer, SpatialTransformer) else f"{theirs}.resnets"
                number = counts[kind] = counts.get(kind, -1) + 1
                pairs = RESBLOCK.items() if isinstance(layer, ResBlock) else [(n, n) for n, _ in layer.named_children()]
                for inner, outer in pairs:
                    yield f"{ours}.{i}.{inner}", f"{kind}.{number}.{outer}"


def _vae(name: str, levels: int) -> str:
    name = name.replace("nin_shortcut", "conv_shortcut").replace("norm_out", "conv_norm_out")
    name = re.sub(r"mid\.block_([12])", lambda match: f"mid_block.resnets.{int(match[1]) - 1}", name)
    name = re.sub(r"mid\.attn_1\.(\w+)", lambda match: f"mid_block.attentions.0.{VAE_ATTENTION[match[1]]}", name)
    name = re.sub(r"\.(down|up)sample\.", r".\1samplers.0.", name)
    name = re.sub(r"\.down\.(\d+)(\.block)?", lambda m: f".down_blocks.{m[1]}{'.resnets' if m[2] else ''}", name)
    return re.sub(
        r"\.up\.(\d+)(\.block)?", lambda m: f".up_blocks.{levels - 1 - int(m[1])}{'.resnets' if m[2] else ''}", name
    )


def _openclip(name: str) -> tuple[str, ...]:
    if name in CLIP_ENDS:
        return (CLIP_ENDS[name],)
    _, _, layer, rest = name.split(".", 3)  # transformer.resblocks.N.…
    start = f"encoder.layers.{layer}."
    if rest.startswith("attn.in_proj_"):  # queries, keys and values, one below the other
        return tuple(f"{start}self_attn.{which}_proj.{rest.removeprefix('attn.in_proj_')}" for which in "qkv")
    inner, _, last = rest.rpartition(".")
    return (f"{start}{CLIP_LAYER[inner]}.{last}",)


def _weights(folder: Path) -> Path | None:
    names = [folder / f"{stem}{ending}" for ending in ENDINGS for stem in STEMS]
    return next((path for path in names if path.is_file()), None)


def _scheduler(path: Path) -> dict:
    try:
        settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: no JSON ({error})") from error
    return settings if isinstance(settings, dict) else {}
