"""Writes a pipeline as a diffusers folder, for diffusers' and transformers' own `from_pretrained`."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.models.autoencoder import AutoencoderKL
from ldm.models.text import ClipText, OpenClipText, TextPair
from ldm.models.tokenizer import Tokenizer
from ldm.models.unet import SIZE_FEATURES, UNet
from ldm.pipeline import StableDiffusion
from ldm.util.cli import UserError
from ldm.util.files import replacing
from ldm.weights.checkpoint import stored, write
from ldm.weights.diffusers_layout import TEXTS, diffusers_names, folders_of, transposes

VERSION = "0.29.0"  # of diffusers: from it on these configs are read as they are


def export_diffusers(sd: StableDiffusion, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Write `unet/`, `vae/`, `text_encoder/`, `tokenizer/`, `scheduler/` and `model_index.json`, for SDXL also
    `text_encoder_2/` and `tokenizer_2/`.

    What the text encoder never runs is left out, as diffusers does (`ldm.weights.diffusers_layout.unrun`).

    Args:
        sd: the pipeline, without a concept injected.
        folder: where to; it must not exist yet, and is there whole or not at all.
        dtype: of every tensor.

    Raises:
        ValueError: the folder exists, or diffusers has no such model: its autoencoder and UNet have one number of
            groups in every GroupNorm, and latents as wide inside the autoencoder as outside.
    """
    folder = Path(folder)
    if folder.exists():
        raise UserError(f"{folder}: exists already; name a new folder")
    texts = {part: text for part, (_, text) in folders_of("text", sd.text).items()}
    parts = {"unet": sd.unet, "vae": sd.vae} | texts
    configs = {
        "unet": unet_config(sd.unet, sd.image_size // sd.vae.factor),
        "vae": vae_config(sd.vae, sd.image_size),
        **{part: text_config(text) for part, text in texts.items()},
    }
    with replacing(folder) as partial:
        for part, module in parts.items():
            (partial / part).mkdir(parents=True)
            _json(partial / part / "config.json", configs[part])
            stem = "model" if part in texts else "diffusion_pytorch_model"
            tensors = diffusers_tensors(module, dtype)
            if part in texts:  # the level `text_model` is read by every version of transformers
                level = {name: "" if name == "text_projection.weight" else "text_model." for name in tensors}
                tensors = {level[name] + name: tensor for name, tensor in tensors.items()}
            write(partial / part / f"{stem}.safetensors", tensors)
        sd.schedule.scheduler("ddim").save_pretrained(partial / "scheduler")
        for part, text in texts.items():
            _tokenizer(partial / part.replace("text_encoder", "tokenizer"), text.tokenizer)
        _json(partial / "model_index.json", _index(isinstance(sd.text, TextPair)))


def diffusers_tensors(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """A module's tensors under diffusers' names, on the CPU; the attention of the VAE has linear layers there."""
    tensors, state = {}, module.state_dict()
    for name, targets in diffusers_names(module).items():
        tensor = stored(state[name], dtype)
        if isinstance(module, AutoencoderKL) and "attn_1" in name and tensor.dim() == 4:
            tensor = tensor.flatten(1)
        tensor = tensor.mT.contiguous() if transposes(name, targets) else tensor
        tensors |= dict(zip(targets, (piece.clone() for piece in tensor.chunk(len(targets))), strict=True))
    return tensors


def unet_config(unet: UNet, sample_size: int) -> dict[str, Any]:
    """Config of diffusers' UNet2DConditionModel."""
    transformer = unet.middle_block[1]
    attention = transformer.transformer_blocks[0].attn2
    depths = [depth if attends else 1 for depth, attends in zip(unet.depths, unet.attends, strict=True)]
    depths[-1] = unet.depths[-1]  # the middle block's too
    sdxl = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": SIZE_FEATURES,
        "projection_class_embeddings_input_dim": unet.label_emb and unet.label_emb[0][0].in_features,
    }
    return {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": VERSION,
        "sample_size": sample_size,
        "in_channels": unet.input_blocks[0][0].in_channels,
        "out_channels": unet.out[2].out_channels,
        "block_out_channels": unet.widths,
        "down_block_types": ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in unet.attends],
        "up_block_types": ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(unet.attends)],
        "layers_per_block": unet.num_res_blocks,
        "transformer_layers_per_block": depths,
        "attention_head_dim": unet.heads,  # their number, whatever its name
        "cross_attention_dim": unet.context_dim,
        "use_linear_projection": transformer.use_linear,
        "upcast_attention": attention.upcast,
        "norm_num_groups": _groups(unet),
        "norm_eps": 1e-5,
        "act_fn": "silu",
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        **({} if unet.label_emb is None else sdxl),
    }


def vae_config(vae: AutoencoderKL, sample_size: int) -> dict[str, Any]:
    """Config of diffusers' AutoencoderKL."""
    widths = [level.block[-1].conv2.out_channels for level in vae.encoder.down]
    if vae.post_quant_conv.out_channels != vae.embed_dim:
        raise UserError("diffusers has no autoencoder with other latents inside than outside (z_channels, embed_dim)")
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": VERSION,
        "sample_size": sample_size,
        "in_channels": vae.encoder.conv_in.in_channels,
        "out_channels": vae.decoder.conv_out.out_channels,
        "latent_channels": vae.embed_dim,
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "layers_per_block": len(vae.encoder.down[0].block),
        "mid_block_add_attention": not isinstance(vae.encoder.mid.attn_1, nn.Identity),
        "norm_num_groups": _groups(vae),
        "act_fn": "silu",
        "scaling_factor": vae.scale_factor,
        "force_upcast": True,
    }


def text_config(text: ClipText | OpenClipText) -> dict[str, Any]:
    """Config of transformers' CLIPTextModel, or CLIPTextModelWithProjection where the encoder pools; OpenCLIP's tower
    without the layers that are not run."""
    pools = isinstance(text, OpenClipText) and text.pools
    if isinstance(text, ClipText):
        config = text.transformer["text_model"].config
        shape = (config.num_hidden_layers, config.num_attention_heads, config.intermediate_size, config.hidden_act)
        vocabulary, positions = config.vocab_size, config.max_position_embeddings
    else:
        blocks = text.model.transformer.resblocks
        layers = len(blocks) - (0 if pools else text.skip)
        shape = (layers, blocks[0].attn.num_heads, blocks[0].mlp.c_fc.out_features, "gelu")
        vocabulary, positions = text.model.token_embedding.num_embeddings, len(text.model.positional_embedding)
    layers, heads, inner, activation = shape
    return {
        "architectures": ["CLIPTextModelWithProjection" if pools else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        "hidden_size": text.width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_act": activation,
        "layer_norm_eps": 1e-5,
        "bos_token_id": text.tokenizer.bos,
        "eos_token_id": text.tokenizer.eos,
        "pad_token_id": text.tokenizer.pad,
        "projection_dim": text.model.text_projection.shape[1] if pools else text.width,
    }


def _groups(module: nn.Module) -> int:
    groups = {norm.num_groups for norm in module.modules() if isinstance(norm, nn.GroupNorm)}
    if len(groups) > 1:
        counts = ", ".join(map(str, sorted(groups)))
        raise UserError(f"diffusers has no {type(module).__name__} with different GroupNorms (of {counts} groups)")
    return groups.pop()


def _tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """CLIP's byte-pair table as transformers' CLIPTokenizer reads it."""
    table = tokenizer.table
    folder.mkdir()
    _json(folder / "vocab.json", table.encoder)
    merges = sorted(table.bpe_ranks, key=table.bpe_ranks.get)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    begin, end, pad = (table.decoder[i] for i in (tokenizer.bos, tokenizer.eos, tokenizer.pad))
    special = {"bos_token": begin, "eos_token": end, "unk_token": end, "pad_token": pad}
    _json(folder / "special_tokens_map.json", special)
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": tokenizer.context_length}
    _json(folder / "tokenizer_config.json", special | settings)


def _index(sdxl: bool) -> dict[str, Any]:
    second = {
        TEXTS[1]: ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "image_encoder": [None, None],
        "force_zeros_for_empty_prompt": True,
    }
    return {
        "_class_name": "StableDiffusionXLPipeline" if sdxl else "StableDiffusionPipeline",
        "_diffusers_version": VERSION,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "feature_extractor": [None, None],
        **(second if sdxl else {"safety_checker": [None, None], "requires_safety_checker": False}),
    }


def _json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
