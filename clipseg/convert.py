"""Names of CLIPSeg's original weights, and of CLIP's, turned into transformers' names.

The original decoder file (`rd64-uni-refined.pth`) holds 54 tensors: the decoder of `CLIPDensePredT` and a linear layer
`reduce` that it never uses. CLIP ViT-B/16, which it does not hold, comes in OpenAI's layout (open_clip's files too) or
as transformers' `CLIPModel`, and pocket's as `ldm.models.clip.Clip`. Tables map an original name to the new ones; where
there are three, the tensor holds queries, keys and values one above the other.
"""

from collections.abc import Mapping

from torch import Tensor
from transformers import CLIPSegConfig, CLIPSegTextConfig, CLIPSegVisionConfig

from ldm.util.cli import UserError

Table = dict[str, tuple[str, ...]]

UNUSED = ("reduce.weight", "reduce.bias")  # of the decoder file
TRANSPOSED = ("visual.proj", "text_projection")  # plain matrices for `x @ W` there, linear layers here
SHOWN = 5  # names in an error message


def refined_config() -> CLIPSegConfig:
    """The network of `rd64-uni-refined.pth` and of `CIDAS/clipseg-rd64-refined`; all else is transformers' default."""
    return CLIPSegConfig(
        text_config=CLIPSegTextConfig().to_dict(),
        vision_config=CLIPSegVisionConfig(patch_size=16).to_dict(),
        use_complex_transposed_convolution=True,
    )


def layer(old: str, new: str, attention: str, names: Mapping[str, str]) -> Table:
    """A transformer layer; `names` are those of its norms and linear layers, old and new."""
    table: Table = {}
    for kind in ("weight", "bias"):
        table[f"{old}.{attention}.in_proj_{kind}"] = tuple(f"{new}.self_attn.{part}_proj.{kind}" for part in "qkv")
        table[f"{old}.{attention}.out_proj.{kind}"] = (f"{new}.self_attn.out_proj.{kind}",)
        table |= {f"{old}.{before}.{kind}": (f"{new}.{after}.{kind}",) for before, after in names.items()}
    return table


def decoder_table(config: CLIPSegConfig) -> Table:
    """Names in the original decoder file -> names in `CLIPSegForImageSegmentation`."""
    depth, stages = len(config.extract_layers), (".0", ".2", ".4")
    stages = stages if config.use_complex_transposed_convolution else ("",)
    linear = ["film_mul", "film_add", *(f"reduces.{i}" for i in range(depth))]
    names = {name: f"decoder.{name}" for name in linear}
    names |= {f"trans_conv{stage}": f"decoder.transposed_convolution{stage}" for stage in stages}
    table = {f"{old}.{kind}": (f"{new}.{kind}",) for old, new in names.items() for kind in ("weight", "bias")}
    parts = {"linear1": "mlp.fc1", "linear2": "mlp.fc2", "norm1": "layer_norm1", "norm2": "layer_norm2"}
    for i in range(depth):
        table |= layer(f"blocks.{i}", f"decoder.layers.{i}", "self_attn", parts)
    return table


def clip_table(config: CLIPSegConfig) -> Table:
    """Names in OpenAI's CLIP -> names in `CLIPSegForImageSegmentation`."""
    vision, text = "clip.vision_model", "clip.text_model"
    names = {
        "logit_scale": "clip.logit_scale",
        "text_projection": "clip.text_projection.weight",
        "positional_embedding": f"{text}.embeddings.position_embedding.weight",
        "token_embedding.weight": f"{text}.embeddings.token_embedding.weight",
        "visual.proj": "clip.visual_projection.weight",
        "visual.class_embedding": f"{vision}.embeddings.class_embedding",
        "visual.positional_embedding": f"{vision}.embeddings.position_embedding.weight",
        "visual.conv1.weight": f"{vision}.embeddings.patch_embedding.weight",
    }
    norms = {
        "ln_final": f"{text}.final_layer_norm",
        "visual.ln_pre": f"{vision}.pre_layrnorm",
        "visual.ln_post": f"{vision}.post_layernorm",
    }
    names |= {f"{old}.{kind}": f"{new}.{kind}" for old, new in norms.items() for kind in ("weight", "bias")}
    table = {old: (new,) for old, new in names.items()}
    parts = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    depths = {
        ("visual.transformer", vision): config.vision_config.num_hidden_layers,
        ("transformer", text): config.text_config.num_hidden_layers,
    }
    for (old, new), depth in depths.items():
        for i in range(depth):
            table |= layer(f"{old}.resblocks.{i}", f"{new}.encoder.layers.{i}", "attn", parts)
    return table


def rename(tensors: Mapping[str, Tensor], table: Table) -> dict[str, Tensor]:
    """Tensors under their new names.

    Raises:
        ValueError: a tensor of the table is missing, or there is one that the table does not know.
    """
    missing = [name for name in table if name not in tensors]
    unexpected = [name for name in tensors if name not in table]
    for problem, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            shown = ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
            raise UserError(f"{len(names)} {problem} tensors: {shown}")
    renamed = {}
    for old, new in table.items():
        tensor = tensors[old].T if old in TRANSPOSED else tensors[old]
        renamed |= dict(zip(new, tensor.tensor_split(len(new)) if len(new) > 1 else (tensor,), strict=True))
    return renamed


def convert_decoder(tensors: Mapping[str, Tensor], config: CLIPSegConfig) -> dict[str, Tensor]:
    """The original decoder's tensors -> transformers' `decoder.*`; raises ValueError as `rename` does."""
    return rename({name: t for name, t in tensors.items() if name not in UNUSED}, decoder_table(config))


def own_name(name: str) -> str:
    """A tensor of `CLIPSegForImageSegmentation.clip` -> its name in `ldm.models.clip.Clip`."""
    name = name.removeprefix("clip.")
    if name.startswith("text_model."):
        return f"text.transformer.{name}"
    return f"vision.{name.removeprefix('vision_model.')}" if name.startswith("vision_model.") else name


def convert_clip(tensors: Mapping[str, Tensor], config: CLIPSegConfig) -> dict[str, Tensor]:
    """CLIP's tensors in OpenAI's layout, transformers', or that of `ldm.models.clip.Clip` -> `clip.*`.

    Raises:
        ValueError: none of these layouts, or as `rename` does.
    """
    table = clip_table(config)
    if "visual.conv1.weight" in tensors:
        return rename(tensors, table)
    names = [name for group in table.values() for name in group]
    if "vision_model.embeddings.patch_embedding.weight" in tensors:
        return rename(tensors, {name.removeprefix("clip."): (name,) for name in names})
    if "text.transformer.text_model.final_layer_norm.weight" in tensors:
        return rename(tensors, {own_name(name): (name,) for name in names})
    raise UserError(
        "neither OpenAI's layout of CLIP (visual.conv1.weight, …) nor transformers' (vision_model.embeddings.…)"
    )
