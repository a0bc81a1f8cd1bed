"""What the forms of a concept file cost in bytes, and in likeness to the full form's samples; prints JSON.

python scripts/compare_forms.py --config configs/backbone/pocket.yaml --concept dog.safetensors
"""

import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from infusion.concepts import FORMS
from infusion.concepts.base import load_base
from infusion.concepts.concept import Concept
from infusion.covariance import InverseCovariance
from infusion.sampling.sample import sample
from infusion.sampling.settings import Settings
from ldm.util.cli import Parser, add_base_flags, count, find_device, report, seed
from ldm.util.config import find


def psnr(images: Tensor, reference: Tensor) -> list[float]:
    """Peak signal-to-noise ratio of each image (B, 3, H, W) in [0, 1], in dB; inf for the same image."""
    values = peak_signal_noise_ratio(images, reference, data_range=1.0, dim=(1, 2, 3), reduction="none")
    return values.tolist()


@report
def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description="Bytes of a concept's forms, and PSNR of their samples to the full form's, as JSON.")
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="backbone config")
    add_base_flags(parser)
    add("--concept", required=True, metavar="FILE", help="concept file, of the form full")
    add("--prompt", help="{} is the concept", default="a photo of a {}")
    add("--n_samples", type=count, help="images", default=4)
    add("--steps", type=count, help="sampling steps", default=Settings().steps)
    add("--seed", type=seed, help="of the first image; image i has the seed + i", default=0)
    add("--covariance", metavar="FILE", help="C⁻¹ that the concept was trained with; None: the identity")
    add("--device", help="such as cpu or cuda:1; auto: CUDA where there is some", default="auto")
    flags = parser.parse_args(arguments)
    concept, inverse = Concept.load(find(flags.concept)), InverseCovariance(flags.covariance)
    sd = load_base(flags, find(flags.config), [concept], find_device(flags.device))
    seeds = [flags.seed + i for i in range(flags.n_samples)]
    forms: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for form in FORMS:  # the full form first
            path = Path(folder) / f"{form}.safetensors"
            concept.save(path, form)
            loaded, prompts = Concept.load(path), [flags.prompt] * flags.n_samples
            settings = Settings(steps=flags.steps)
            images = sample(sd, prompts, [loaded], settings, seed=seeds, inverse_covariance=inverse.matrix)
            forms[form] = {"bytes": path.stat().st_size, "relative_error": loaded.relative_error(concept)}
            if form == FORMS[0]:
                reference = images
            else:
                decibels = [value if math.isfinite(value) else None for value in psnr(images, reference)]
                worst = min((value for value in decibels if value is not None), default=None)
                forms[form] |= {"psnr": decibels, "worst_psnr": worst}  # None: the same image, bit for bit
    print(json.dumps({"numbers": concept.numbers, "prompt": flags.prompt, "seeds": seeds, "forms": forms}, indent=2))


if __name__ == "__main__":
    main()
