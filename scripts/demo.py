"""Learns three concepts on the pocket model, draws them in new settings, measures that, and writes a report.

    python scripts/demo.py                          # about ten minutes on two cores; outputs/demo/report.html
    python scripts/demo.py --concepts other_fish trainer.max_steps=200
"""

import json
import logging
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from tqdm import tqdm

from data.dataset import ConceptImages
from data.pocket.backgrounds import BACKGROUNDS
from data.pocket.concepts import CONCEPTS
from data.pocket.judge import CLASSIFIER_WEIGHTS, CLIP_WEIGHTS, Context, Figure, Judge, contexts
from infusion.concept import Concept
from infusion.generate import Settings, generate
from infusion.pictures import Numbered, captioned_grid, heat, png
from infusion.report import data_uri, render, scalars
from infusion.tokens import fill
from ldm.config import ROOT, load_config
from ldm.errors import Parser, UserError, report, suggestion
from ldm.pipeline import StableDiffusion

LEVELS = {1: "known words, never seen together", 2: "a pattern never seen", 3: "a shape never seen"}
METRICS = {  # name -> title and note in the report
    "background": ("Background as prompted", ""),
    "style": ("Style as prompted", "photo or cartoon"),
    "colour": ("The concept’s colour", "which no prompt names"),
    "pattern": ("The concept’s pattern", "which no prompt names"),
    "photos_background": ("Photos’ background", "which no prompt names: lower is better"),
}
PHOTOS = "data/pocket/concepts"

logger = logging.getLogger(__name__)


def parse(arguments: list[str] | None) -> Namespace:
    parser = Parser(description="Learns concepts on the pocket model, draws, measures and reports them.")
    add = parser.add_argument
    add("overrides", nargs="*", metavar="key=value", help="overrides of the config, for example trainer.max_steps=200")
    add("--base", metavar="FILE", help="config to train with", default="configs/pocket_demo.yaml")
    usual = "blue_striped_dog,zigzag_hat,other_backpack"
    add("--concepts", metavar="A[,B]", help=f"some of {', '.join(CONCEPTS)}", default=usual)
    add("--samples", type=int, help="samples of each concept, spread over 14 prompts", default=32)
    add("--steps", type=int, help="DDIM steps", default=25)
    add("--scale", type=float, help="classifier-free guidance", default=5.0)
    add("--seed", type=int, help="of the first sample; sample i has the seed + i", default=100)
    add("--batch_size", type=int, help="samples at a time", default=16)
    add("--clip", metavar="FILE", help="weights of the pocket CLIP", default=str(CLIP_WEIGHTS))
    add("--classifier", metavar="FILE", help="weights of the pocket classifier", default=str(CLASSIFIER_WEIGHTS))
    add("--outdir", metavar="DIR", help="where to write; while it is not empty, DIR-2, DIR-3 …", default="outputs/demo")
    flags = parser.parse_args(arguments)
    flags.concepts = flags.concepts.split(",")
    for name in flags.concepts:
        if name not in CONCEPTS:
            parser.error(f"--concepts: there is no `{name}`{suggestion(name, list(CONCEPTS))}")
    for name in ("samples", "steps", "batch_size"):
        if getattr(flags, name) < 1:
            parser.error(f"--{name}: a whole number above 0 is wanted, not {getattr(flags, name)}")
    for word in flags.overrides:
        if "=" not in word:
            parser.error(f"`{word}`: write an override as key=value")
    return flags


def free_folder(path: Path) -> Path:
    """`path` itself, or with the first number behind it under which there is nothing yet."""
    number = 1
    folder = path
    while folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        number += 1
        folder = path.with_name(f"{path.name}-{number}")
    return folder


def train(name: str, flags: Namespace, folder: Path) -> tuple[Path, list[str]]:
    """Train by main.py's own command line; returns the concept file and the command."""
    run = folder / name / "run"
    command = ["main.py", "--base", flags.base, "-t", "--logdir", str(run), *flags.overrides]
    command += [f"superclass={CONCEPTS[name].noun}", f"data_root={PHOTOS}/{name}"]
    status = run_main(command)
    if status:
        raise SystemExit(status)  # main.py has said why
    trained = sorted((run / "models").glob("step=*.safetensors"))
    if not trained:
        raise UserError(f"{run}: training has left no concept file")
    file = folder / "concepts" / f"{name}.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(trained[-1], file)
    return file, ["python", *command]


def run_main(command: list[str]) -> int:
    """The exit status of `python main.py …`."""
    return subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:]]).returncode


def draw(
    sd: StableDiffusion, concept: Concept, places: Sequence[Context], settings: Settings, flags: Namespace, name: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Samples of base model and Infusion from the same seeds, and the concept's attention maps: three times (B, …)."""
    base, ours, maps = [], [], []
    for start in tqdm(range(0, len(places), flags.batch_size), f"drawing {name}"):
        templates = [place.template for place in places[start : start + flags.batch_size]]
        seeds = [flags.seed + start + i for i in range(len(templates))]
        base.append(generate(sd, [fill(template, [concept.superclass]) for template in templates], seeds, (), settings)[0])
        images, attention = generate(sd, templates, seeds, [concept], settings, sd.latent_shape()[1:])
        ours.append(images)
        maps.append(attention[:, 0])
    return torch.cat(base), torch.cat(ours), torch.cat(maps)


def write_pictures(
    folder: Path, places: Sequence[Context], seeds: Sequence[int], rows: dict[str, Tensor], concept: Concept, known: dict
) -> list[dict]:
    """Every sample and attention map as a PNG, and the grid; returns the report's cards, one for each context."""
    files = {kind: [] for kind in ("base", "infusion", "attention")}
    writers = {kind: Numbered(folder / ("samples" if kind != "attention" else "") / kind) for kind in files}
    for i, (place, seed) in enumerate(zip(places, seeds, strict=True)):
        prompt = fill(place.template, [concept.superclass])
        pictures = {"base": rows["base"][i], "infusion": rows["infusion"][i]}
        pictures["attention"] = heat(pictures["infusion"], rows["attention"][i])
        for kind, picture in pictures.items():
            text = {"model": kind, "prompt": prompt if kind == "base" else place.template, "seed": seed} | known
            content = png(picture, text)
            writers[kind].write(content)
            files[kind].append(data_uri(content))
    shown = min(len(contexts_of(places)), len(places))
    captions = [f"{fill(place.template, [concept.superclass])} ({seed})" for place, seed in zip(places, seeds, strict=True)]
    streams = {"photos": rows["photos"], "base model": rows["base"], "Infusion": rows["infusion"]}
    (folder / "grid.png").write_bytes(png(captioned_grid(streams, captions[:shown]), known))
    return [
        {"prompt": fill(places[i].template, [concept.superclass]), "seed": seeds[i]}
        | {kind: uris[i] for kind, uris in files.items()}
        for i in range(shown)
    ]


def contexts_of(places: Sequence[Context]) -> set[str]:
    return {place.template for place in places}


def learn(name: str, flags: Namespace, sd: StableDiffusion, judge: Judge, settings: Settings, folder: Path) -> dict:
    """Everything about one concept: train, draw, measure, write; returns what the report shows of it."""
    world = CONCEPTS[name]
    started = time.monotonic()
    file, command = train(name, flags, folder)
    seconds = time.monotonic() - started
    concept = Concept.load(file)
    around = contexts(world)
    places = [around[i % len(around)] for i in range(flags.samples)]
    seeds = [flags.seed + i for i in range(flags.samples)]
    photos = (ConceptImages(f"{PHOTOS}/{name}", sd.image_size, world.noun).images + 1) / 2
    base, ours, attention = draw(sd, concept, places, settings, flags, name)
    figures = judge.measure(world, places, photos, base, ours)
    known = asdict(settings) | {"concept": name, "base": sd.architecture, "base_sha256": sd.hash}
    rows = {"photos": photos, "base": base, "infusion": ours, "attention": attention}
    columns = write_pictures(folder / name, places, seeds, rows, concept, known)
    shares = [value for tag, value in scalars(folder / name / "run" / "tensorboard").items() if tag.startswith("share/")]
    sample = ["python", "scripts/infusion_txt2img.py", "--personalized_ckpt", str(file), "--prompt", places[0].template]
    sample += ["--steps", str(flags.steps), "--scale", f"{flags.scale:g}", "--seed", str(flags.seed), "--n_samples", "1"]
    return {
        "name": name,
        "title": name.replace("_", " ").capitalize(),
        "level": world.level,
        "level_text": LEVELS[world.level],
        "superclass": world.noun,
        "setting": f"a {world.style} {BACKGROUNDS[world.background]}",
        "photos": [data_uri(png(photo)) for photo in photos],
        "columns": columns,
        "figures": figures,
        "numbers": concept.numbers,
        "layers": len(concept.tensors),
        "file": file.relative_to(folder).as_posix(),
        "bytes": file.stat().st_size,
        "steps": concept.steps,
        "learning_rate": concept.learning_rate,
        "seconds": seconds,
        "share": sum(shares) / len(shares) if shares else None,
        "prompts": [place.template for place in places],
        "train_command": shlex.join(command),
        "sample_command": shlex.join(sample),
    }


def write_report(folder: Path, concepts: list[dict], settings: dict, seconds: float) -> Path:
    """results.json and report.html."""
    pictures = ("photos", "columns")
    plain = [{key: value for key, value in concept.items() if key not in pictures} for concept in concepts]
    results = {"concepts": plain, "settings": settings, "seconds": round(seconds, 1)}
    (folder / "results.json").write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    page = render(
        "demo.html.j2",
        concepts=concepts,
        settings=settings,
        metrics=METRICS,
        low=lowest([concept["figures"]["similarity"] for concept in concepts]),
        photo_columns=max(len(concept["photos"]) for concept in concepts),
        date=f"{datetime.now():%Y-%m-%d %H:%M}",
        minutes=f"{seconds / 60:.1f}",
        command=shlex.join(["python", "scripts/demo.py", *sys.argv[1:]]),
    )
    (folder / "report.html").write_text(page, encoding="utf-8")
    return folder / "report.html"


def lowest(figures: Sequence[dict[str, Figure]]) -> float:
    """The left end of the scale of likeness: 0, or the tenth below the lowest whisker."""
    ends = [figure["value"] - 2 * figure["stderr"] for metric in figures for figure in metric.values()]
    return min(0.0, int(min(ends) * 10 - 1) / 10)


@report
def main(arguments: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    flags = parse(arguments)
    started = time.monotonic()
    judge = Judge.load(clip_weights=flags.clip, classifier_weights=flags.classifier)
    sd = StableDiffusion.from_checkpoint(load_config(flags.base, flags.overrides))
    settings = Settings(steps=flags.steps, scale=flags.scale)
    folder = free_folder(Path(flags.outdir))
    concepts = []
    for i, name in enumerate(flags.concepts):
        logger.info("%d/%d %s", i + 1, len(flags.concepts), name)
        concepts.append(learn(name, flags, sd, judge, settings, folder))
    chosen = asdict(settings)
    shown = {"samples": flags.samples, "first_seed": flags.seed, "base_model": sd.architecture, "sampler": settings.sampler}
    shown |= {key: chosen[key] for key in ("steps", "scale", "beta", "tau", "strength")} | {"base_sha256": sd.hash or "none"}
    page = write_report(folder, concepts, shown, time.monotonic() - started)
    for concept in concepts:
        like = concept["figures"]["similarity"]
        logger.info("%s: likeness %.2f -> %.2f", concept["name"], like["base"]["value"], like["infusion"]["value"])
    logger.info("done in %.0f s: open %s", time.monotonic() - started, page)


if __name__ == "__main__":
    main()
