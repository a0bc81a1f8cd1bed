"""The demonstration on the pocket model: mask photos, train a concept, draw it, measure that, and write a report."""

import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from tqdm import tqdm

from clipseg.model import ClipSeg
from data.dataset import ConceptImages
from data.masks import load_mask, segment_folder
from data.pocket.backgrounds import BACKGROUNDS
from data.pocket.concepts import CONCEPTS, FOLDER
from infusion.concepts.concept import Concept
from infusion.gate import IDENTITY
from infusion.metrics.report.page import data_uri, decimal, percent, render
from infusion.sampling.customised import Customised
from infusion.sampling.pictures import Numbered, captioned_grid, heat, png
from infusion.sampling.png import describe, hashes
from infusion.sampling.sample import sample
from infusion.sampling.settings import Settings
from infusion.tokens import fill
from ldm.pipeline import StableDiffusion
from ldm.util.cli import UserError
from ldm.util.config import ROOT
from ldm.util.files import copy, write
from scripts.pocket.evaluate_masks import concept_photos, iou
from scripts.pocket.judge import Context, Figure, Judge, contexts, mean

LEVELS = {1: "known words in a new combination", 2: "a pattern or pair of colours never seen", 3: "a shape never seen"}
METRICS = {  # name -> title in the report
    "background": "Background as prompted",
    "style": "Style as prompted (photo or cartoon)",
    "colour": "The concept’s colour, which no prompt names",
    "pattern": "The concept’s pattern, which no prompt names",
    "photos_background": "Photos’ background, which no prompt names (lower is better)",
}


@dataclass(frozen=True)
class Plan:
    """What to do with each concept.

    Attributes:
        base: config to train with. overrides: `key=value`, of that config.
        samples: how many of each concept, spread evenly over its contexts. seed: of the first; sample i has seed + i.
        settings: how to draw them. batch_size: samples at a time.
        folder: where everything is written.
    """

    base: str
    overrides: tuple[str, ...]
    samples: int
    seed: int
    settings: Settings
    batch_size: int
    folder: Path

    @property
    def seeds(self) -> list[int]:
        return [self.seed + i for i in range(self.samples)]

    def shown(self, sd: StableDiffusion) -> dict[str, object]:
        """What the report lists as settings."""
        chosen = asdict(self.settings)
        chosen = {key: chosen[key] for key in ("sampler", "steps", "scale", "beta", "tau", "strength")}
        seeds = f"{self.seeds[0]} to {self.seeds[-1]}"
        return {
            "samples": self.samples,
            "seeds": seeds,
            **chosen,
            "base_model": sd.architecture,
            "base_sha256": sd.hash,
        }


def free_folder(path: Path) -> Path:
    """`path` itself, or `path-2`, `path-3`, …: the first that does not exist or is empty."""
    folder, number = path, 1
    while folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        number += 1
        folder = path.with_name(f"{path.name}-{number}")
    return folder


def segment(name: str, plan: Plan, clipseg: ClipSeg | None) -> tuple[Path, Figure]:
    """Copy a concept's photos, with masks by CLIPSeg, or without one with the true masks.

    Returns the copies' folder and the mean overlap of the masks with the true ones (`evaluate_masks.iou`).
    """
    folder = plan.folder / name / "photos"
    for photo in sorted((FOLDER / name).glob("*.png")):
        copy(photo, folder / photo.name)
    if clipseg is None:
        shutil.copytree(FOLDER / name / "mask", folder / "mask")
        return folder, mean([1.0] * len(list(folder.glob("*.png"))))
    rows = segment_folder(folder, CONCEPTS[name].noun, clipseg)
    _, true = concept_photos(name)
    return folder, mean([iou(load_mask(row.mask), answer) for row, answer in zip(rows, true, strict=True)])


def train(name: str, photos: Path, plan: Plan) -> tuple[Path, list[str]]:
    """Train on a folder of photos by main.py's own command line; returns the concept file and the command."""
    run = plan.folder / name / "run"
    command = ["python", "main.py", "--base", plan.base, "-t", "--logdir", str(run), *plan.overrides]
    command += [f"superclass={CONCEPTS[name].noun}", f"data_root={photos}"]
    if status := call(command):
        raise SystemExit(status)  # the command has said why
    trained = sorted((run / "models").glob("step=*.safetensors"))
    if not trained:
        raise UserError(f"{run}: training has left no concept file")
    file = concept_file(plan, name)
    copy(trained[-1], file)
    return file, command


def call(command: Sequence[str]) -> int:
    """The exit status of `python SCRIPT …` of this repository, run by this Python."""
    return subprocess.run([sys.executable, str(ROOT / command[1]), *command[2:]]).returncode


def draw(
    sd: StableDiffusion, concept: Concept, places: Sequence[Context], plan: Plan, name: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Samples of the base model and of Infusion (B, 3, H, W) in [0, 1] from the same seeds, and attention (B, h, w)."""
    base, ours, attention = [], [], []
    for start in tqdm(range(0, len(places), plan.batch_size), f"drawing {name}"):
        templates = [place.template for place in places[start : start + plan.batch_size]]
        seeds = plan.seeds[start : start + plan.batch_size]
        plain = [fill(template, [concept.superclass]) for template in templates]
        base.append(sample(sd, plain, settings=plan.settings, seed=seeds))
        with Customised(sd, [concept], plan.settings) as customised:
            denoise = customised(templates, map_grid=sd.latent_shape()[1:])
            ours.append(sd.decode(sd.draw_latents(denoise, seeds, plan.settings.steps)))
        attention.append(denoise.attention_maps[:, 0])
    return torch.cat(base), torch.cat(ours), torch.cat(attention)


def learn(name: str, plan: Plan, sd: StableDiffusion, clipseg: ClipSeg | None, judge: Judge) -> dict:
    """Mask, train, draw, measure and write one concept; returns what the report says of it."""
    world = CONCEPTS[name]
    masked, overlap = segment(name, plan, clipseg)
    started = time.monotonic()
    file, command = train(name, masked, plan)
    seconds, concept = time.monotonic() - started, Concept.load(file)
    around = contexts(world)
    places = [around[i % len(around)] for i in range(plan.samples)]
    photos = (ConceptImages(masked, sd.image_size, world.noun).images + 1) / 2
    base, ours, attention = draw(sd, concept, places, plan, name)
    maps = torch.stack([heat(image, level) for image, level in zip(ours, attention, strict=True)])
    pictures = {"base": base, "infusion": ours, "attention": maps}
    cards = [
        {"template": place.template, "prompt": fill(place.template, [concept.superclass]), "seed": seed}
        for place, seed in zip(places, plan.seeds, strict=True)
    ]
    columns = write_pictures(plan, name, photos, pictures, cards, len(around), sd)
    figures = judge.measure(world, places, photos, base, ours)
    shares = [value for tag, value in scalars(plan.folder / name / "run/tensorboard").items() if "share/" in tag]
    return {
        "name": name,
        "title": name.replace("_", " ").capitalize(),
        "level": world.level,
        "level_text": LEVELS[world.level],
        "superclass": world.noun,
        "setting": BACKGROUNDS[world.background],
        "photos": [data_uri(png(photo)) for photo in photos],
        "columns": columns,
        "figures": figures,
        "verdict": verdict(figures),
        "prompts": [place.template for place in places],
        "masks": overlap,
        "masked_by": "CLIPSeg" if clipseg else "the world that drew the photos",
        "numbers": concept.numbers,
        "layers": len(concept.tensors),
        "file": file.relative_to(plan.folder).as_posix(),
        "bytes": file.stat().st_size,
        "steps": concept.steps,
        "learning_rate": concept.learning_rate,
        "seconds": seconds,
        "share": sum(shares) / len(shares) if shares else None,
        "train_command": shlex.join(command),
        "sample_command": shlex.join(sample_command(file, places[0].template, plan)),
    }


def write_pictures(
    plan: Plan,
    name: str,
    photos: Tensor,
    pictures: dict[str, Tensor],
    cards: list[dict],
    columns: int,
    sd: StableDiffusion,
) -> list[dict]:
    """Writes every picture of a concept as `<name>/<kind>/00000.png` … and the first `columns` as `<name>/grid.png`.

    A PNG says how it was made, as those of the sampling command do.

    Args:
        photos: (P, 3, H, W). pictures: kinds base, infusion and attention, each (B, 3, H, W). All in [0, 1].
        cards: template, prompt and seed of the B pictures.

    Returns:
        The first cards with their pictures, as the report shows them.
    """
    folder, file = plan.folder / name, str(concept_file(plan, name))
    flags = {"config": f"configs/backbone/{sd.architecture}.yaml"}
    for kind, images in pictures.items():
        writer, files = Numbered(folder / kind), [] if kind == "base" else [file]
        of_files = hashes(sd.hash, files, IDENTITY)
        for card, image in zip(cards, images, strict=True):
            own = {"prompt": card["template" if files else "prompt"], "seed": card["seed"]}
            own |= {"personalized_ckpt": ",".join(files)}
            content = png(image, describe(plan.settings, flags | own, of_files) | {"kind": kind})
            writer.write(content)
            card[kind] = data_uri(content)
    captions = [f"{card['prompt']} ({card['seed']})" for card in cards[:columns]]
    rows = {"base model": pictures["base"], "Infusion": pictures["infusion"]}
    sheet = captioned_grid(rows, captions, {"concept’s photos": photos})
    write(folder / "grid.png", png(sheet))
    return cards[:columns]


def concept_file(plan: Plan, name: str) -> Path:
    return plan.folder / "concepts" / f"{name}.safetensors"


def sample_command(file: Path, prompt: str, plan: Plan) -> list[str]:
    """What draws the plan's first sample of a prompt by the sampling command."""
    command = ["python", "scripts/infusion_txt2img.py", "--personalized_ckpt", str(file), "--prompt", prompt]
    command += ["--steps", str(plan.settings.steps), "--scale", f"{plan.settings.scale:g}"]
    return [*command, "--seed", str(plan.seed), "--n_samples", "1"]


def scalars(folder: Path) -> dict[str, float]:
    """The last value of every scalar in a TensorBoard folder; {} when there is none."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}


def write_report(plan: Plan, concepts: list[dict], sd: StableDiffusion, seconds: float, command: str) -> Path:
    """Writes `results.json` and `report.html`; returns the latter."""
    shown, settings = ("photos", "columns", "verdict"), plan.shown(sd)
    plain = [{key: value for key, value in concept.items() if key not in shown} for concept in concepts]
    results = {"concepts": plain, "settings": settings, "seconds": round(seconds, 1), "command": command}
    text = json.dumps(results, indent=2, ensure_ascii=False) + "\n"
    write(plan.folder / "results.json", text.encode())
    page = render(
        Path(__file__).with_name("demo.html.j2"),
        concepts=concepts,
        settings=settings,
        metrics=METRICS,
        date=f"{datetime.now():%Y-%m-%d %H:%M}",
        minutes=f"{seconds / 60:.1f}",
        command=command,
    )
    file = plan.folder / "report.html"
    write(file, page.encode())
    return file


def verdict(figures: dict[str, dict[str, Figure]]) -> str:
    """What the measurements of one concept say, in two sentences; see `Judge.measure`."""
    like, gain = figures["similarity"], figures["similarity"]["difference"]
    change = f"from {decimal(like['base']['value'])} to {decimal(like['infusion']['value'])}"
    if abs(gain["value"]) <= 2 * gain["stderr"]:
        first = f"Likeness to the photos does not change clearly ({change})."
    elif gain["value"] < 0:
        first = f"Likeness to the photos falls {change}: this concept was not learned."
    else:
        first = f"Likeness to the photos rises {change} (ceiling: {decimal(like['drawn']['value'])})."
    said = [
        f"the prompted {name} is right in {percent(figures[name]['infusion']['value'])} of the samples "
        f"(base model: {percent(figures[name]['base']['value'])})"
        for name in ("background", "style")
    ]
    return f"{first} {said[0].capitalize()}, {said[1]}."
