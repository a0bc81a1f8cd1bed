"""Measures how much customised models overfit and how well they show their concepts, and writes a report.

python scripts/metrics.py --personalized_ckpt logs/cat,logs/cat_lora --images photos/cat --clip ckpt/clip --out out/cat
"""

import argparse
import logging
import shlex
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from omegaconf import OmegaConf

from infusion.concepts.base import (
    architecture_of,
    check_concepts_there,
    check_fit,
    check_there,
    check_weights,
    load_base,
)
from infusion.concepts.runs import concept_files
from infusion.metrics.run.options import CACHE, METRICS, STEPS, Options, lacks
from infusion.metrics.run.protocol import CONTEXT, GROUPS, Protocol, plain, usual_file
from infusion.sampling.validate import check_concepts
from ldm.diffusion.schedulers import SAMPLERS
from ldm.training.config import texts
from ldm.util.cli import (
    More,
    Parser,
    UserError,
    add_base_flags,
    batch,
    count,
    find_device,
    naming,
    number,
    processes,
    report,
    seed,
    suggestion,
    words,
    writable,
)
from ldm.util.config import files_in, find, load_config
from ldm.util.defaults import CLIPSEG, POCKET
from ldm.util.files import locked
from ldm.util.folders import CONFIG, is_run
from ldm.util.templates import bare, foreign_warning
from scripts.infusion_txt2img import find_config
from scripts.pocket.networks import BACKBONES, WORLDS, Sources

if TYPE_CHECKING:
    from torch import Tensor

    from infusion.metrics.run.subject import Subject
    from ldm.models.tokenizer import Tokenizer

LONGEST = 400  # characters of a name or of a concept in words
logger = logging.getLogger(__name__)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    usual = Options()
    parser = Parser(description="Measures how much customised models overfit, and how well they show their concepts.")
    add = parser.add_argument
    add("--config", metavar="FILE", help="backbone config; None: the one that the concept files name")
    add_base_flags(parser)
    listed = {"type": files_in, "action": More}
    about = "concept files, files of other tools, or run folders; of epochs of one training, the one to keep is told"
    add("--personalized_ckpt", metavar="A[,B]", nargs="+", default=[], help=about, **listed)
    about = "the concept in words, for a row of the base model told them; once for each concept; None: the world's own"
    add("--described", metavar="TEXT", type=described, action="append", help=about)
    about = "a row of pictures that something else has drawn; again for more rows"
    add("--pictures", metavar="NAME=DIR", type=pictures, action="append", default=[], help=about)
    add("--prompts", metavar="FILE", help="of --pictures, one a line, {} for the concept; None: each has its own")
    about = "the noun of --pictures and of files of other tools that do not say it; None: that of the concepts"
    add("--superclass", metavar="W", type=bare, help=about)
    add("--noun", metavar="WORDS", help="trigger words of files of other tools that do not say them")
    add("--labels", metavar="L[,L]", type=words, help="names in the report; None: those of the files and folders")
    add("--groups", metavar="G[,G]", type=words, help="what belongs together, one for each row; None: the methods")
    add("--metrics", metavar="M[,M]", type=metrics, help=f"some of {', '.join(METRICS)}; None: all that can be had")
    add("--out", metavar="DIR", type=writable, help="gets report.html, metrics.json …", default="outputs/metrics")
    add("--cache", type=writable, metavar="DIR", help=f"rows measured before; None: {CACHE} in --out")
    about = "photos of the concept, one folder for all or one for each of --personalized_ckpt and then --pictures"
    add("--images", metavar="DIR[,DIR]", help=about, **listed)
    about = "square of a photo that is compared; None: as the run trained on it, or else subject"
    add("--photo_crop", choices=["subject", "middle"], help=about)
    add("--concept", metavar="C[,C]", type=words, help="pocket: the world's name of it; None: as the folder is called")
    about = "prompts, for all or one each; None: the architecture's"
    add("--protocol", metavar="P[,P]", help=about, **listed)
    add("--neighbours", metavar="N[,N]", type=words, help="nouns beside the superclass; None: the protocol's")
    add("--clip", metavar="DIR", help="folder of a CLIP, or pocket; None: pocket on a pocket model")
    add("--dino", metavar="DIR", help="folder of a DINO, for dino and pres")
    add("--dinov2", metavar="DIR", help="folder of a DINOv2")
    add("--identity", metavar="FILE", help="weights of pocket two's identity network; None: the shipped ones there")
    add("--lpips", metavar="FILE", help="AlexNet's weights, for div by LPIPS; None: by features")
    add("--clipseg", metavar="DIR", help=f"folder of CLIPSeg, or pocket; None: {CLIPSEG}; pocket on a pocket model")
    add("--crop", action="store_true", help="compare photos and samples by their subject alone, found by CLIPSeg")
    add("--covariance", metavar="FILE", help="C⁻¹ that the concepts were trained with; None: the identity")
    add("--samples", type=count, help="of each kind", default=usual.samples)
    add("--batch_size", type=batch, help="samples at a time", default=usual.batch_size)
    add("--steps", type=steps, help="sampling steps", default=usual.steps)
    add("--scale", type=number, help="classifier-free guidance; 1 is none", default=usual.scale)
    add("--sampler", choices=list(SAMPLERS), help="the sampler", default=usual.sampler)
    add("--seed", type=seed, help="sample i has this + 100,000,000 + i: no training's", default=usual.seed)
    add("--strata", type=steps, help="parts of the noise schedule, one timestep from each", default=usual.strata)
    add("--weighting", choices=["eps", "score"], help="of LFD's errors", default=usual.weighting)
    add("--curve", metavar="G[,G]", type=words, default=",".join(usual.curve), help="LFD's groups over training steps")
    add("--beta", type=number, help="similarity at which the gate is half open", default=usual.beta)
    add("--tau", type=temperature, help="temperature of the gate, above 0", default=usual.tau)
    add("--strength", type=number, help="factor on what was learned", default=usual.strength)
    add("--resamples", type=count, help="of W2's bootstrap", default=usual.resamples)
    add("--precision", choices=["full", "autocast"], help="of the UNet", default=usual.precision)
    add("--device", help="such as cpu or cuda:1; auto: CUDA where there is some", default="auto")
    add("--devices", type=processes, help="processes here that share the work, each with a device", default=1)
    add("--num_nodes", type=count, help="machines that share it", default=1)
    flags = parser.parse_args(arguments)
    if unknown := [name for name in flags.curve if name not in GROUPS]:
        parser.error(f"--curve: there is no group `{unknown[0]}`; there are {', '.join(GROUPS)}")
    if not flags.personalized_ckpt and not flags.pictures:
        parser.error("the following arguments are required: --personalized_ckpt, or --pictures")
    if flags.prompts and not flags.pictures:
        parser.error("--prompts: these are of --pictures; those of concepts are in --protocol")
    return flags


# types of flags, for argparse


def metrics(text: str) -> list[str]:
    """Names of metrics with commas between them, each once."""
    names = list(dict.fromkeys(words(text)))
    if unknown := [name for name in names if name not in METRICS]:
        raise argparse.ArgumentTypeError(f"there is no `{unknown[0]}`{suggestion(unknown[0], list(METRICS))}")
    return names


def steps(text: str) -> int:
    return count(text, STEPS)


def temperature(text: str) -> float:
    if (value := number(text)) <= 0:
        raise argparse.ArgumentTypeError(f"`{text}` is not above 0")
    return value


def described(text: str) -> str:
    """A concept in words, as they stand in a prompt."""
    if not text.strip() or not text.isprintable() or set("{}") & set(text) or len(text) > LONGEST:
        raise argparse.ArgumentTypeError(f"`{text[:30]}` is not a few words such as 'a striped blue dog'")
    return text.strip()


def pictures(text: str) -> tuple[str, str]:
    """A row's name, and a folder."""
    name, _, folder = (part.strip() for part in text.partition("="))
    if not name or not folder or not name.isprintable() or len(name) > LONGEST:
        raise argparse.ArgumentTypeError(f"`{text[:80]}` is not such as NAME=FOLDER")
    return name, folder


# what the flags name


def check_inputs(flags: argparse.Namespace) -> str:
    """Raises UserError for what is not there, before anything slow is imported.

    Flags of one value for all rows or one for each have one for each from here on.

    Returns:
        The base model's architecture; "" where only files of other tools tell it.
    """
    check_concepts_there(flags.personalized_ckpt)
    rows = len(flags.personalized_ckpt) + len(flags.pictures)
    for flag in ("images", "protocol", "concept"):
        values = getattr(flags, flag) or [None]
        if len(values) not in (1, rows):
            raise UserError(f"--{flag}: give one for all or one for each of {rows}, not {len(values)}")
        setattr(flags, flag, values * rows if len(values) == 1 else values)
    if flags.groups and len(flags.groups) != rows:
        raise UserError(f"--groups: {len(flags.groups)} for {rows} rows; give one for each")
    for folder in flags.images:
        check_there("images", folder, "folder")
    for _, folder in flags.pictures:
        check_there("pictures", folder, "folder")
    for name in filter(None, flags.protocol):
        Protocol.load(name)
    for flag in (*BACKBONES, "clipseg"):
        if getattr(flags, flag) != POCKET:
            check_there(flag, getattr(flags, flag), "folder")
    for flag in ("lpips", "identity", "prompts"):
        check_there(flag, getattr(flags, flag))
    if flags.covariance and not find(flags.covariance).is_file():
        raise UserError(f"{flags.covariance}: there is no such covariance file")
    architecture = None
    if flags.personalized_ckpt:
        architecture = architecture_of(concept_files(find(flags.personalized_ckpt[0]))[0])
        if architecture is None and not flags.config:
            return ""
    return check_base(flags, architecture)


def check_base(flags: argparse.Namespace, architecture: str | None) -> str:
    """The base model's architecture, --config's if None; UserError where its weights or CLIPSeg's are not there."""
    config = find_config(flags, architecture)
    check_weights(flags, config)
    architecture = architecture or OmegaConf.select(load_config(config), "sd.params.name") or ""
    region = flags.crop or flags.metrics is None or {"lfd", "exact"} & set(flags.metrics)
    if region and not flags.clipseg and architecture and architecture not in WORLDS and not find(CLIPSEG).exists():
        raise UserError(f"--clipseg: there is no folder {CLIPSEG}: get CIDAS/clipseg-rd64-refined, or name its folder")
    return architecture


def load_concepts(flags: argparse.Namespace) -> "list[Subject]":
    """The rows of --personalized_ckpt."""
    from infusion.metrics.run.subject import load_subjects

    said = {name: " ".join(getattr(flags, name).split()) for name in ("superclass", "noun") if getattr(flags, name)}
    groups = flags.groups and flags.groups[: len(flags.personalized_ckpt)]
    rows = load_subjects(flags.personalized_ckpt, flags.labels, groups, said)
    for name, word in said.items():
        if not (name == "superclass" and flags.pictures) and word not in (getattr(row.concept, name) for row in rows):
            raise UserError(f"--{name}: the files say it themselves: {getattr(rows[0].concept, name)!r}")
    return rows


def find_rows(flags: argparse.Namespace, rows: "list[Subject]", architecture: str) -> "list[Subject]":
    """Concepts, pictures without their pixels, and words, with their photos' folders and what is known exactly."""
    from infusion.metrics.run.epochs import as_epochs
    from infusion.metrics.run.subject import Pictures, Subject, in_words

    concepts, world, usual = len(rows), WORLDS.get(architecture), str(usual_file(architecture))
    nouns = [flags.superclass] if flags.superclass else list({row.superclass for row in rows})
    if flags.pictures and len(nouns) != 1:
        raise UserError("--superclass: name what --pictures show, such as dog")
    groups = flags.groups[concepts:] if flags.groups else [""] * len(flags.pictures)
    for (name, folder), group in zip(flags.pictures, groups, strict=True):
        rows = [*rows, Subject(name, group=group, pictures=Pictures(folder), superclass=nouns[0])]
    labels = [row.label for row in rows]
    if double := [label for label in labels if labels.count(label) > 1]:
        raise UserError(f"--pictures: two rows are called {double[0]!r}; give each a name of its own")
    found = []
    for row, folder, name, protocol in zip(rows, flags.images, flags.concept, flags.protocol, strict=True):
        if name and world is None:
            raise UserError(f"--concept: {name} is of the pocket world, {row.label} of another base model")
        name = name or (world.exact.recognise(folder) if folder and world else None)
        row = replace(row, photos_from=folder or "", exact=world.exact(name) if name else None)
        crop = (flags.photo_crop or crop_of(row, found)) if folder else ""
        found.append(replace(row, crop=crop, protocol=protocol or usual))
    found = as_epochs(found[:concepts]) + found[concepts:]
    told = found[:concepts] or found
    return found + in_words(told, words_of(told, flags.described))


def crop_of(row: "Subject", before: "Sequence[Subject]") -> str:
    """How a row's photos were cropped in training, as its run's config says; pictures have it as a concept before them.

    Runs from before there was the key `crop` took the middle; a concept file without its run does not say, and has the
    usual one.
    """
    if row.pictures:
        return next((one.crop for one in before if one.photos_from == row.photos_from), "subject")
    config = next((folder / CONFIG for folder in Path(row.last.file).absolute().parents[:3] if is_run(folder)), None)
    if config is None:
        return "subject"
    said = texts(OmegaConf.to_container(load_config(config)).get("data", {}))
    return next((value for key, value in said if key.split(".")[-1] == "crop"), "middle")


def words_of(subjects: "Sequence[Subject]", given: Sequence[str] | None) -> list[str]:
    """Words for each of the subjects: as given, once for all or once for each concept, or the world's."""
    names = list(dict.fromkeys(subject.name for subject in subjects))
    if given is None:
        return [subject.exact.described if subject.exact else "" for subject in subjects]
    if len(given) not in (1, len(names)):
        raise UserError(f"--described: give it once, or once for each of {len(names)} concepts, not {len(given)} times")
    return [given[names.index(subject.name) % len(given)] for subject in subjects]


def choose(flags: argparse.Namespace, rows: "list[Subject]", there: set[str]) -> Options:
    """The options; without --metrics, all that every row of the right kind can have."""
    if "classifier" not in there:
        if flags.metrics and "exact" in flags.metrics and all(row.exact for row in rows):
            raise UserError("--metrics: exact figures need the pocket world's classifier, which is not in ckpt/")
        rows = [replace(row, exact=None) for row in rows]
    kinds = {row.kind for row in rows}
    able = [name for name, about in METRICS.items() if kinds & set(about.kinds)]
    able = [name for name in able if not any(lacks(name, row, there) for row in rows)]
    names = {field.name for field in fields(Options)} - {"metrics", "curve"}
    chosen = {name: getattr(flags, name) for name in names}
    return Options(tuple(flags.metrics or able), curve=tuple(flags.curve), **chosen)


def read_images(flags: argparse.Namespace, rows: "list[Subject]", size: int) -> "list[Subject]":
    """The rows with their photos and pictures, of so many pixels a side; photos of one folder are read once."""
    from data.dataset import ConceptImages
    from data.pictures import read_pictures

    @cache
    def photos(folder: str, crop: str) -> "tuple[Tensor, int]":
        there = ConceptImages(folder, size, None, mask="none", crop=crop, key="--images")
        return (there.images + 1) / 2, there.folder.images_left_out

    found = []
    for row in rows:
        if row.photos_from:
            images, left_out = photos(row.photos_from, row.crop)
            row = row.with_photos(images, row.photos_from, left_out)
        if row.pictures:
            drawn = read_pictures(row.pictures.folder, size, flags.prompts)
            own = {"images": drawn.images, "prompts": drawn.prompts, "rule": drawn.rule}
            row = replace(row, pictures=replace(row.pictures, left_out=drawn.folder.images_left_out, **own))
            logger.info("%s: %s: %s; %s", row.label, drawn.folder.root, drawn.folder.report(), drawn.rule)
        found.append(row)
    return found


def check_texts(tokenizer: "Tokenizer", protocol: Protocol, superclass: str, described: str = "") -> None:
    """Raises UserError for a prompt of a protocol, with the noun or other words for {}, that cannot be read whole."""
    word = bare(described or superclass)
    for group in (CONTEXT, "none", "superclass"):
        tokenizer.windows([plain(prompt, word) for prompt in protocol.prompts(group, superclass)])


@report
def main(arguments: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    flags = parse(arguments)
    architecture = check_inputs(flags)
    from data.dataset import ConceptImages  # after the flags: these take seconds
    from infusion.metrics.report.epochs import epochs_of, in_order
    from infusion.metrics.report.output import Measured, check_folder, write
    from infusion.metrics.run.cache import Cache
    from infusion.metrics.run.evaluate import check, evaluate
    from infusion.sampling.customised import check_covariance
    from ldm.util.dist import launch

    rows = load_concepts(flags)
    if rows and not architecture:
        architecture = check_base(flags, rows[0].concept.architecture)
    concepts = {one.file: one.concept for row in rows for one in row.checkpoints}
    config = find_config(flags, architecture)
    check_fit(flags, config, concepts)
    rows = find_rows(flags, rows, architecture)
    for folder, crop in dict.fromkeys((row.photos_from, row.crop) for row in rows if row.photos_from):
        # before what is slow; the model says which size is wanted
        there = ConceptImages(folder, 64, None, mask="none", crop=crop, key="--images")
        logger.info("%s: %s", folder, there.folder.report())
    sources = Sources(flags, WORLDS.get(architecture))
    options = choose(flags, rows, sources.there)
    names = dict.fromkeys(row.protocol for row in rows)
    protocols = {name: Protocol.load(name).beside(flags.neighbours or ()) for name in names}
    ranks, device = launch(flags.devices, flags.num_nodes, find_device(flags.device))
    tools = sources.load(flags, options, device)
    check_covariance(list(concepts.values()), tools.inverse_covariance)
    sd = load_base(flags, config, list(concepts.values()), device)
    for concept in concepts.values():
        concept.check_base(sd.architecture, sd.hash)
    check_concepts(sd, concepts, tools.inverse_covariance)
    rows = read_images(flags, rows, sd.image_size)
    for i, row in enumerate(rows):
        if options.wants("exact") and row.exact:
            exact = sources.world.exact(row.exact.name, tools.classifier, tools.clipseg)
            rows[i] = row = replace(row, exact=exact)
        check(row, protocols[row.protocol], options, tools)
        with naming(f"{row.label}: its prompts"):
            check_texts(sd.text.tokenizer, protocols[row.protocol], row.superclass, row.described)
    if odd := foreign_warning(prompt for protocol in protocols.values() for prompt in protocol.concept):
        logger.warning("warning: --protocol: %s", odd)
    out, files = Path(flags.out), {"base": sd.hash or "", **tools.hashes}
    settings = options.shown() | {"architecture": sd.architecture}
    settings |= {"protocols": {name: protocol.as_dict() for name, protocol in protocols.items()}}
    check_folder(out, {row.label: row.about()["sha256"] for row in rows}, settings)
    command = shlex.join(["python", "scripts/metrics.py", *(sys.argv[1:] if arguments is None else arguments)])
    with locked(out) if ranks.first else nullcontext():
        kept = Cache(flags.cache or out / CACHE, progress=True, ranks=ranks)
        results = [
            evaluate(sd, row, protocols[row.protocol], options, kept, tools) | {"protocol": row.protocol}
            for row in rows
        ]
        results = in_order(results)
        if ranks.first:
            for epochs in epochs_of(results):
                logger.info("%s", epochs.in_words())
            logger.info("open %s", write(out, Measured(results, settings, files, command)))


if __name__ == "__main__":
    main()
