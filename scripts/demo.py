"""Learns one concept of each level on the pocket model, samples it in new contexts, and writes a report."""

import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from torchvision.utils import make_grid

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data.dataset import ConceptImages  # noqa: E402
from data.pocket.concepts import CONCEPTS, FOLDER  # noqa: E402
from data.pocket.demo import contexts, draw, heat, judge, labelled_grid  # noqa: E402
from data.pocket.judge import load_classifier, load_clip  # noqa: E402
from infusion.concept import Concept  # noqa: E402
from infusion.report import render, write  # noqa: E402
from ldm.errors import Parser, UserError, report  # noqa: E402
from ldm.images import save_png  # noqa: E402
from ldm.pipeline import StableDiffusion  # noqa: E402

LEVELS = {
    1: "a combination of known attributes that the model was never trained on",
    2: "a pattern, or a pair of colours, that the model has never seen",
    3: "a shape that the model has never seen, of a known kind of thing",
}


def free_folder(folder: Path) -> Path:
    """The folder, or where it has content, the first of folder-2, folder-3, … that has none."""
    tried, number = folder, 1
    while tried.exists() and any(tried.iterdir()):
        number += 1
        tried = folder.with_name(f"{folder.name}-{number}")
    return tried


def train(name: str, folder: Path, extra: list[str]) -> tuple[Path, float]:
    """Train one concept by main.py; the concept's file and the seconds taken."""
    began = time.perf_counter()
    command = [sys.executable, str(ROOT / "main.py"), "--base", str(ROOT / "configs" / "pocket_demo.yaml"), "-t"]
    command += [
        "--logdir",
        str(folder / "runs" / name),
        f"superclass={CONCEPTS[name].noun}",
        f"data_root={FOLDER / name}",
    ]
    if subprocess.run([*command, *extra], cwd=ROOT).returncode:
        raise UserError(f"training {name} failed; its own message is above")
    return max((folder / "runs" / name / "models").glob("step=*.safetensors")), time.perf_counter() - began


@report
def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--concepts", nargs="+", default=["blue_striped_dog", "zigzag_hat", "other_backpack"],
                        choices=list(CONCEPTS), metavar="NAME", help=f"which of {', '.join(CONCEPTS)}")  # fmt: skip
    parser.add_argument(
        "--outdir",
        type=Path,
        default=Path("outputs/demo"),
        help="where to write; a number is added to a folder with content",
    )
    parser.add_argument("--seeds", type=int, default=4, help="samples of each of the 8 contexts")
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps")
    parser.add_argument("--scale", type=float, default=5.0, help="guidance scale")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes to configs/pocket_demo.yaml")
    flags = parser.parse_args()
    began, folder = time.perf_counter(), free_folder(flags.outdir)
    sd = StableDiffusion.from_checkpoint(ROOT / "configs" / "backbone" / "pocket.yaml")
    clip, classifier = load_clip(), load_classifier()

    items, results = [], {}
    for name in flags.concepts:
        file, seconds = train(name, folder, flags.set)
        concept = Concept.load(file)
        concept.save(folder / f"{name}.safetensors")
        photos = (ConceptImages(FOLDER / name, sd.image_size, concept.superclass).images + 1) / 2
        drawn = draw(sd, concept, contexts(CONCEPTS[name]), flags.seeds, flags.steps, flags.scale)
        results[name] = judge(drawn, photos, clip, classifier)
        shown = range(0, len(drawn.prompts), flags.seeds)
        (folder / name).mkdir(parents=True)
        for i, prompt in enumerate(drawn.prompts):
            settings = {"prompt": prompt, "seed": i, "steps": flags.steps, "scale": flags.scale}
            save_png(drawn.base[i], folder / name / f"{i:03d}-base.png", settings)
            save_png(drawn.customised[i], folder / name / f"{i:03d}-infusion.png", settings | {"concept": name})
            save_png(heat(drawn.attention[i], drawn.customised[i]), folder / name / f"{i:03d}-attention.png")
        labelled_grid(photos, drawn, shown, folder / f"{name}.png")
        pairs = torch.stack([drawn.base, drawn.customised]).unflatten(1, (-1, 8)).transpose(0, 1).flatten(0, 2)
        items.append({
            "title": name.replace("_", " "), "noun": concept.superclass, "level": CONCEPTS[name].level,
            "photos": photos,
            "steps": concept.steps, "learning_rate": concept.learning_rate, "seconds": round(seconds),
            "figures": results[name], "all": make_grid(pairs, 8),
            "columns": [{"prompt": drawn.prompts[i].format(concept.superclass), "base": drawn.base[i],
                         "customised": drawn.customised[i], "attention": heat(drawn.attention[i], drawn.customised[i])}
                        for i in shown]})  # fmt: skip
    total = f"{time.perf_counter() - began:.0f} s"
    settings = f"{flags.steps} DDIM steps, guidance {flags.scale}, torch {torch.__version__}"
    (folder / "results.json").write_text(
        json.dumps({"figures": results, "settings": settings, "seconds": total}, indent=2)
    )
    page = render("demo.html.j2", items=items, levels=LEVELS, numbers=concept.numbers, total=total, settings=settings,
                  command="python " + " ".join(sys.argv))  # fmt: skip
    write(page, folder / "report.html")
    print(f"{folder / 'report.html'} ({total})")


if __name__ == "__main__":
    main()
