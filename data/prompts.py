"""The prompts that concepts are trained on, those of `configs/data/templates.yaml`."""

from ldm.util.config import ROOT, load_config

TEMPLATES: tuple[str, ...] = tuple(load_config(ROOT / "configs/data/templates.yaml").templates)
