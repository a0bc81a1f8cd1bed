"""Draws the images of a superclass that a training would draw, into `data.params.prior.params.root`.

python scripts/experiments/class_images.py --base configs/backbone/sd15.yaml configs/method/dreambooth.yaml \
  superclass=cat data_root=photos/cat data.params.prior.params.root=photos/class-cat
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import main as training
from ldm.training.config import read_config
from ldm.util.cli import find_device, report


@report
def main(arguments: list[str] | None = None) -> None:
    config = read_config(training.parse(arguments))
    from ldm.training.setup import build_model, quiet
    from ldm.util.config import instantiate

    quiet()
    model = build_model(config)
    with model.unedited():
        instantiate(config.data.params.prior, "data.params.prior").latents(model.sd.to(find_device("auto")))


if __name__ == "__main__":
    main()
