"""Where CLIPSeg's weights come from: a Hugging Face folder, or a decoder and the CLIP that it was trained on."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPSegConfig

from clipseg.convert import convert_clip, convert_decoder
from clipseg.model import ClipSeg
from ldm.models.tokenizer import Tokenizer
from ldm.util.cli import UserError
from ldm.util.config import ConfigError, find, instantiate, load_config, resolve
from ldm.util.defaults import CLIPSEG as USUAL
from ldm.util.defaults import POCKET
from ldm.util.defaults import POCKET_CLIPSEG as POCKET_WEIGHTS
from ldm.weights.checkpoint import listed
from ldm.weights.files import TensorFile

SOURCE = (
    "copy the files of `CIDAS/clipseg-rd64-refined` (Hugging Face) into that folder, or name the original "
    "`rd64-uni-refined.pth` (https://github.com/timojl/clipseg) and a CLIP ViT-B/16"
)
POCKET_CONFIG = Path("configs/pocket_clipseg.yaml")
FILES = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")
SIZE = 352  # pixels of the squares that the published networks were trained on


def load(model_weight: str | Path = USUAL, clip: str | Path | None = None, config: str | Path | None = None) -> ClipSeg:
    """CLIPSeg with its weights, in evaluation mode, on the CPU, in float32.

    Args:
        model_weight: a Hugging Face folder; the original decoder file; `pocket` for the network of the pocket world;
            with `config`, a file of that config's network, or of its decoder where the config names a `clip`.
        clip: CLIP ViT-B/16 for the decoder file: a folder or file in a layout that `clipseg.convert` knows.
        config: a config with a node `clipseg`, and a key `clip` where its CLIP has a file of its own.

    Raises:
        ValueError: something is missing, cannot be read, or does not fit.
    """
    if str(model_weight) == POCKET:
        model_weight, config = POCKET_WEIGHTS, config or POCKET_CONFIG
    path = find(model_weight)
    if not path.exists():
        raise UserError(f"model_weight: there is no {model_weight}" + ("" if config else f"; {SOURCE}"))
    if path.is_dir():
        if config or clip:
            raise UserError(f"{'config' if config else 'clip'}: the folder {model_weight} brings its own: leave it out")
        return from_folder(path)
    if config and clip:
        raise UserError(f"clip: {config} names the network's CLIP: leave clip out")
    if config:
        return from_config(config, path)
    if clip is None:
        raise UserError(
            f"clip: {path} holds CLIPSeg's decoder alone; name a CLIP ViT-B/16 too, such as the files of "
            "`openai/clip-vit-base-patch16` (Hugging Face)"
        )
    return fill(empty(refined_config(), SIZE), convert_decoder(read(path)) | read_clip(clip), f"{path} and {clip}")


def refined_config() -> CLIPSegConfig:
    """The network of `rd64-uni-refined.pth` and of `CIDAS/clipseg-rd64-refined`; all else is transformers' default."""
    return CLIPSegConfig(vision_config={"patch_size": 16}, use_complex_transposed_convolution=True)


def from_config(config: str | Path, file: Path) -> ClipSeg:
    """The network of a config's node `clipseg`, CLIP from its key `clip`; raises ValueError if a file does not fit."""
    nodes = resolve(load_config(find(config)))
    if "clipseg" not in nodes:
        raise ConfigError(f"{config}: the config has no node `clipseg`")
    with torch.device("meta"):
        model = instantiate(nodes.clipseg, "clipseg")
    clip = nodes.get("clip")
    return fill(model, (read_clip(clip) if clip else {}) | read(file), f"{file} and {clip}" if clip else file)


def on_clip(clipseg: ClipSeg, clip: str | Path, start: str | Path | None = None) -> ClipSeg:
    """A network to train: the CLIP of a file, and the decoder of another or, without one, drawn anew.

    Raises:
        ValueError: a file does not fit.
    """
    decoder = clipseg.network.decoder
    for module in decoder.modules():  # transformers draws most of it with a deviation of 1
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            module.reset_parameters()
    drawn = {f"decoder.{name}": tensor for name, tensor in decoder.state_dict().items()}
    fill(clipseg, read_clip(clip) | (drawn if start is None else read(find(start))), clip)
    decoder.requires_grad_(True)
    return clipseg.train()


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file's mapping; raises UserError if it holds none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file.parent}: no JSON of a network: {file.name}: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{file.parent}: no JSON of a network: {file.name} holds a {type(found).__name__}")
    return found


def from_folder(folder: Path) -> ClipSeg:
    """A Hugging Face folder with `config.json` and weights; raises ValueError if it is another, or does not fit."""
    config, processor = folder / "config.json", folder / "preprocessor_config.json"
    found, processing = read_json(config), read_json(processor) if processor.is_file() else {}
    size = processing.get("size", SIZE)
    if found.get("model_type") != "clipseg":
        raise UserError(f"{config}: is of a {found.get('model_type')}, not of a clipseg")
    size = size.get("height", SIZE) if isinstance(size, Mapping) else size
    file = weights_file(folder)
    return fill(empty(CLIPSegConfig.from_dict(found), size), read(file), file)


def empty(config: CLIPSegConfig, size: int) -> ClipSeg:
    """A published network without values; CLIP's own tokenizer."""
    with torch.device("meta"):
        return ClipSeg(config, Tokenizer(context_length=config.text_config.max_position_embeddings), size)


def read_clip(path: str | Path) -> dict[str, Tensor]:
    """CLIP's tensors from a file or folder, named `clip.*`; raises ValueError if there is none."""
    found = find(path)
    if not found.exists():
        raise UserError(f"clip: there is no {path}")
    return convert_clip(read(weights_file(found) if found.is_dir() else found))


def read(file: Path) -> dict[str, Tensor]:
    """Every tensor of a file but the position numbers that old ones store; raises ValueError as `TensorFile`."""
    with TensorFile(file) as content:
        return {name: content.read(name) for name in content.shapes if not name.endswith("position_ids")}


def fill(model: ClipSeg, tensors: Mapping[str, Tensor], source: object) -> ClipSeg:
    """Give a network on the meta device its values, in float32; ValueError unless names and shapes are the same."""
    expected = model.network.state_dict()
    wrong = {
        "are missing": [name for name in expected if name not in tensors],
        "are not the network's": [name for name in tensors if name not in expected],
        "have another shape": [n for n, t in tensors.items() if n in expected and t.shape != expected[n].shape],
    }
    for problem, names in wrong.items():
        if names:
            raise UserError(f"{source}: {len(names)} tensors {problem}: {listed(names)}")
    model.network.load_state_dict({name: t.float() for name, t in tensors.items()}, assign=True)
    return model.eval().requires_grad_(False)


def weights_file(folder: Path) -> Path:
    """The file of weights in a folder; raises ValueError if there is none."""
    file = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if file is None:
        raise UserError(f"{folder}: holds no weights ({', '.join(FILES)})")
    return file
