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
from ldm.pipeline import StableDiffusion
from ldm.util.cli import Parser, add_base_flags, count, find_device, number, report, seed
from ldm.util.config import find


def psnr(images: Tensor, reference: Tensor) -> list[float]:
    """Peak signal-to-noise ratio of each image (B, 3, H, W) in [0, 1], in dB; inf for the same image."""
    values = peak_signal_noise_ratio(images, reference, data_range=1.0, dim=(1, 2, 3), reduction="none")
    return values.tolist()


def compare_forms(
    sd: StableDiffusion,
    concept: Concept,
    prompts: list[str],
    seeds: list[int],
    settings: Settings,
    inverse_covariance: Tensor | None = None,
) -> dict[str, dict[str, Any]]:
    """Form -> `bytes`, `relative_error` of the numbers, and of the samples `psnr` (dB, one each) and `worst_psnr`.

    The reference is the full form, which has no `psnr`. An image that equals the full form's bit for bit counts null.
    """
    forms: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for form in FORMS:
            path = Path(folder) / f"{form}.safetensors"
            concept.save(path, form)
            loaded = Concept.load(path)
            images = sample(sd, prompts, [loaded], settings, seed=seeds, inverse_covariance=inverse_covariance)
            forms[form] = {"bytes": path.stat().st_size, "relative_error": loaded.relative_error(concept)}
            if form == FORMS[0]:
                reference = images
            else:
                decibels = psnr(images, reference)
                finite = [value if math.isfinite(value) else None for value in decibels]
                worst = min((value for value in finite if value is not None), default=None)
                forms[form] |= {"psnr": finite, "worst_psnr": worst}
    return forms


@report
def main(arguments: list[str] | None = None) -> None:
    usual = Settings()
    parser = Parser(description="Bytes of a concept's forms, and PSNR of their samples to the full form's, as JSON.")
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="backbone config")
    add_base_flags(parser)
    add("--concept", required=True, metavar="FILE", help="concept file, of the form full")
    add("--prompt", nargs="+", help="{} is the concept; taken in turn", default=["a photo of a {}"])
    add("--n_samples", type=count, help="images", default=4)
    add("--steps", type=count, help="sampling steps", default=usual.steps)
    add("--scale", type=number, help="classifier-free guidance; 1 is none", default=usual.scale)
    add("--seed", type=seed, help="of the first image; image i has the seed + i", default=0)
    add("--covariance", metavar="FILE", help="C⁻¹ that the concept was trained with; None: the identity")
    add("--device", help="such as cpu or cuda:1; auto: CUDA where there is some", default="auto")
    flags = parser.parse_args(arguments)
    concept, inverse = Concept.load(find(flags.concept)), InverseCovariance(flags.covariance)
    device = find_device(flags.device)
    sd = load_base(flags, find(flags.config), [concept], device)
    prompts = [flags.prompt[i % len(flags.prompt)] for i in range(flags.n_samples)]
    seeds = [flags.seed + i for i in range(flags.n_samples)]
    settings = Settings(steps=flags.steps, scale=flags.scale)
    forms = compare_forms(sd, concept, prompts, seeds, settings, inverse.matrix)
    print(json.dumps({"numbers": concept.numbers, "prompts": prompts, "seeds": seeds, "forms": forms}, indent=2))


if __name__ == "__main__":
    main()
