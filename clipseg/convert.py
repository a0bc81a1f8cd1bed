"""Names of CLIPSeg's original weights, and of CLIP's, turned into transformers' names.

The original decoder file (`rd64-uni-refined.pth`) holds 54 tensors: the decoder of `CLIPDensePredT` and a linear layer
`reduce` that it never uses. CLIP ViT-B/16, which it does not hold, comes in OpenAI's layout (open_clip's files too), as
transformers' `CLIPModel`, or, pocket's, as `ldm.models.clip.Clip`.
"""

import re
from collections.abc import Mapping

from torch import Tensor

Rules = Mapping[str, str]  # what a name matches -> what takes its place, one rule after the other

UNUSED = ("reduce.weight", "reduce.bias")  # of the decoder file
TRANSPOSED = ("visual.proj", "text_projection")  # plain matrices for `x @ W` there, linear layers here
DECODER: Rules = {
    r"^blocks\.": "layers.",
    r"\.linear(\d)\.": r".mlp.fc\1.",
    r"\.norm(\d)\.": r".layer_norm\1.",
    r"^trans_conv\.": "transposed_convolution.",
    r"^": "decoder.",
}
CLIP: Rules = {
    # ldm.models.clip.Clip
    r"^text\.transformer\.": "",
    r"^vision\.": "vision_model.",
    # OpenAI
    r"^visual\.transformer\.resblocks\.": "vision_model.encoder.layers.",
    r"^transformer\.resblocks\.": "text_model.encoder.layers.",
    r"\.attn\.": ".self_attn.",
    r"\.ln_(\d)\.": r".layer_norm\1.",
    r"\.mlp\.c_fc\.": ".mlp.fc1.",
    r"\.mlp\.c_proj\.": ".mlp.fc2.",
    r"^visual\.proj$": "visual_projection.weight",
    r"^text_projection$": "text_projection.weight",
    r"^visual\.conv1\.": "vision_model.embeddings.patch_embedding.",
    r"^visual\.class_embedding$": "vision_model.embeddings.class_embedding",
    r"^visual\.positional_embedding$": "vision_model.embeddings.position_embedding.weight",
    r"^positional_embedding$": "text_model.embeddings.position_embedding.weight",
    r"^token_embedding\.": "text_model.embeddings.token_embedding.",
    r"^visual\.ln_pre\.": "vision_model.pre_layrnorm.",
    r"^visual\.ln_post\.": "vision_model.post_layernorm.",
    r"^ln_final\.": "text_model.final_layer_norm.",
    # transformers
    r"^": "clip.",
}


def rename(tensors: Mapping[str, Tensor], rules: Rules) -> dict[str, Tensor]:
    """Tensors under transformers' names; queries, keys and values that were one tensor become three."""
    renamed = {}
    for old, tensor in tensors.items():
        name = old
        for pattern, new in rules.items():
            name = re.sub(pattern, new, name)
        if "in_proj_" in name:
            parts = [name.replace("in_proj_", f"{part}_proj.") for part in "qkv"]
            renamed |= dict(zip(parts, tensor.chunk(3), strict=True))
        else:
            renamed[name] = tensor.T if old in TRANSPOSED else tensor
    return renamed


def convert_decoder(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The original decoder's tensors -> `decoder.*` of `CLIPSegForImageSegmentation`."""
    return rename({name: tensor for name, tensor in tensors.items() if name not in UNUSED}, DECODER)


def convert_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CLIP's tensors in any of the three layouts -> `clip.*` of `CLIPSegForImageSegmentation`."""
    return rename(tensors, CLIP)
