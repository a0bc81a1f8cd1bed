"""Names that commands take: of components, and of files where no flag names one.

Files are relative to the working directory, or else to the repository. Commands show them in `--help`, so nothing that
is slow to import is needed here.
"""

from pathlib import Path

# component (attribute of StableDiffusion) -> what its tensors' names begin with in a checkpoint
PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text": "cond_stage_model."}
PAIR = "conditioner."  # the same for SDXL's two text encoders
CLIPSEG = "ckpt/clipseg-rd64-refined"
POCKET = "pocket"  # names the pocket world's own network where a flag wants a folder or file
POCKET_CLIP = Path("ckpt/pocket/clip.safetensors")
POCKET_CLIPSEG = Path("ckpt/pocket/clipseg.safetensors")
POCKET_CLASSIFIER = Path("ckpt/pocket/classifier.safetensors")
