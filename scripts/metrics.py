"""Measures how much customised models overfit and how well they show their concepts, and writes a report.

python scripts/metrics.py --personalized_ckpt logs/cat,logs/cat_lora --images photos/cat --clip ckpt/clip --out out/cat
"""

import argparse
import logging
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.prompts import TEMPLATES
from infusion.concepts.base import architecture_of, check_concepts_there, check_there, check_weights, load_base
from infusion.metrics.run.options import CACHE, METRICS, OF_PHOTOS, Options, Tools, identity
from infusion.metrics.run.protocol import GROUPS, Protocol, usual_file
from infusion.sampling.validate import check_concepts
from ldm.diffusion.schedulers import SAMPLERS
from ldm.util.cli import (
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
    words,
    writable,
)
from ldm.util.config import find
from ldm.util.defaults import CLIPSEG, POCKET, POCKET_CLASSIFIER, POCKET_CLIPSEG
from ldm.util.files import locked
from scripts.infusion_txt2img import find_config

if TYPE_CHECKING:
    import torch

    from infusion.metrics.run.subject import Subject

Loaded = TypeVar("Loaded")
logger = logging.getLogger(__name__)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    usual = Options()
    parser = Parser(description="Measures how much customised models overfit, and how well they show their concepts.")
    add = parser.add_argument
    add("--config", metavar="FILE", help="backbone config; None: the one that the concept files name")
    add_base_flags(parser)
    add("--personalized_ckpt", metavar="A[,B]", type=words, required=True, help="concept files, or run folders")
    add("--labels", metavar="L[,L]", type=words, help="names in the report; None: those of the files and folders")
    add("--groups", metavar="G[,G]", type=words, help="what belongs together, one for each; None: the methods")
    add("--metrics", metavar="M[,M]", type=words, help=f"some of {', '.join(METRICS)}; None: all that can be had")
    add("--out", metavar="DIR", type=writable, help="gets report.html, metrics.json …", default="outputs/metrics")
    add("--cache", type=writable, metavar="DIR", help=f"rows measured before; None: {CACHE} in --out")
    add("--images", metavar="DIR[,DIR]", type=words, help="photos of the concept, one folder for all or one each")
    add("--concept", metavar="C[,C]", type=words, help="pocket: the world's name of it; None: as the folder is called")
    add("--protocol", metavar="P[,P]", type=words, help="prompts, for all or one each; None: the architecture's")
    add("--neighbours", metavar="N[,N]", type=words, help="nouns beside the superclass; None: the protocol's")
    add("--clip", metavar="DIR", help="folder of a CLIP, or pocket; None: pocket on the pocket model")
    add("--dino", metavar="DIR", help="folder of a DINO, for dino and pres")
    add("--lpips", metavar="FILE", help="AlexNet's weights, for div by LPIPS; None: by features")
    add("--clipseg", metavar="DIR", help=f"folder of CLIPSeg, or pocket; None: {CLIPSEG}; pocket on the pocket model")
    add("--covariance", metavar="FILE", help="C⁻¹ that the concepts were trained with; None: the identity")
    add("--samples", type=count, help="of each kind", default=usual.samples)
    add("--batch_size", type=batch, help="samples at a time", default=usual.batch_size)
    add("--steps", type=count, help="sampling steps", default=usual.steps)
    add("--scale", type=number, help="classifier-free guidance; 1 is none", default=usual.scale)
    add("--sampler", choices=list(SAMPLERS), help="the sampler", default=usual.sampler)
    add("--seed", type=seed, help="of the first sample; sample i has the seed + i", default=usual.seed)
    add("--strata", type=count, help="parts of the noise schedule, one timestep from each", default=usual.strata)
    add("--weighting", choices=["eps", "score"], help="of LFD's errors", default=usual.weighting)
    add("--curve", metavar="G[,G]", type=words, default=",".join(usual.curve), help="LFD's groups over training steps")
    add("--beta", type=number, help="similarity at which the gate is half open", default=usual.beta)
    add("--tau", type=number, help="temperature of the gate, above 0", default=usual.tau)
    add("--strength", type=number, help="factor on what was learned", default=usual.strength)
    add("--resamples", type=count, help="of W2's bootstrap", default=usual.resamples)
    add("--precision", choices=["full", "autocast"], help="of the UNet", default=usual.precision)
    add("--device", help="such as cpu or cuda:1; auto: CUDA where there is some", default="auto")
    add("--devices", type=processes, help="processes here that share the work, each with a device", default=1)
    add("--num_nodes", type=count, help="machines that share it", default=1)
    flags = parser.parse_args(arguments)
    if unknown := [name for name in flags.curve if name not in GROUPS]:
        parser.error(f"--curve: there is no group `{unknown[0]}`; there are {', '.join(GROUPS)}")
    return flags


def check_inputs(flags: argparse.Namespace) -> None:
    """Raises UserError for a file or folder that is not there, before what is slow to import."""
    check_concepts_there(flags.personalized_ckpt)
    for folder in one_each(flags.images, len(flags.personalized_ckpt), "images"):
        check_there("images", folder, "folder")
    for name in one_each(flags.protocol, len(flags.personalized_ckpt), "protocol"):
        if name:
            Protocol.load(name)
    for flag in ("clip", "dino", "clipseg", "lpips"):
        if getattr(flags, flag) != POCKET:
            check_there(flag, getattr(flags, flag), "file" if flag == "lpips" else "folder")
    if flags.covariance and not find(flags.covariance).is_file():
        raise UserError(f"{flags.covariance}: there is no such covariance file")
    first = find(flags.personalized_ckpt[0])
    files = sorted(first.glob("models/*.safetensors")) if first.is_dir() else [first]
    architecture = architecture_of(files[0]) if files else None
    if flags.config or architecture:
        check_weights(flags, find_config(flags, architecture))
    region = flags.metrics is None or {"lfd", "exact"} & set(flags.metrics)
    if region and not flags.clipseg and architecture not in (None, POCKET) and not find(CLIPSEG).exists():
        raise UserError(f"--clipseg: there is no folder {CLIPSEG}: get CIDAS/clipseg-rd64-refined, or name its folder")


def describe(flags: argparse.Namespace, subjects: "list[Subject]") -> "list[Subject]":
    """The subjects with their photos' folders and, on the pocket world, what is known exactly."""
    from scripts.pocket.exact import Exact, recognise  # after the flags: it takes seconds

    folders = one_each(flags.images, len(subjects), "images")
    names = one_each(flags.concept, len(subjects), "concept")
    found = []
    for subject, folder, name in zip(subjects, folders, names, strict=True):
        pocket = subject.concept.architecture == POCKET
        name = name or (recognise(folder) if folder and pocket else None)
        if name and not pocket:
            raise UserError(f"--concept: {name} is of the pocket world, {subject.label} of another base model")
        found.append(replace(subject, photos_from=folder or "", exact=Exact(name) if name else None))
    return found


def one_each(values: Sequence[str] | None, subjects: int, flag: str) -> list[str | None]:
    """One value for all subjects or one for each."""
    values = [None] if values is None else list(values)
    if len(values) not in (1, subjects):
        raise UserError(f"--{flag}: give one for all or one for each of {subjects}, not {len(values)}")
    return values * subjects if len(values) == 1 else values


def choose(flags: argparse.Namespace, subjects: "list[Subject]", pocket: bool) -> Options:
    """The options; without --metrics, all that the other flags allow."""
    able = {"clip_t": flags.clip or pocket, "w2": flags.clip or pocket, "drift": flags.clip or pocket}
    able |= {"clip_i": able["clip_t"], "dino": flags.dino, "pres": flags.dino or able["clip_t"]}
    able |= {"div": flags.lpips or flags.dino or able["clip_t"], "exact": all(subject.exact for subject in subjects)}
    able |= {name: able[name] and all(subject.photos_from for subject in subjects) for name in OF_PHOTOS}
    metrics = flags.metrics or [name for name in METRICS if able.get(name, True)]
    names = {field.name for field in fields(Options)} - {"metrics", "curve"}
    return Options(
        tuple(dict.fromkeys(metrics)), curve=tuple(flags.curve), **{name: getattr(flags, name) for name in names}
    )


def load_tools(flags: argparse.Namespace, options: Options, pocket: bool, device: "torch.device") -> Tools:
    """The networks that the metrics need."""
    from clipseg.weights import POCKET_CONFIG
    from clipseg.weights import load as load_clipseg
    from infusion.covariance import InverseCovariance
    from infusion.metrics.run.features import load_backbone

    clip, clipseg = flags.clip or (POCKET if pocket else None), flags.clipseg or (POCKET if pocket else CLIPSEG)
    inverse, files, loaded = InverseCovariance(flags.covariance), {}, {}
    for name, spec in (("clip", clip), ("dino", flags.dino)):
        if spec:
            loaded[name], files[name] = named(name, load_backbone, spec, device), identity(spec)
    if options.wants("lfd", "exact"):
        if find(clipseg).is_file() and not pocket:
            raise UserError(
                f"--clipseg: {clipseg} is a file; name a folder with the files of CIDAS/clipseg-rd64-refined"
            )
        own = None if find(clipseg).is_dir() or not pocket else POCKET_CONFIG
        loaded["clipseg"] = named("clipseg", load_clipseg, clipseg, None, own).to(device)
        files["clipseg"] = identity(POCKET_CLIPSEG if clipseg == POCKET else clipseg)
    if options.wants("exact"):
        files["classifier"] = identity(POCKET_CLASSIFIER)
    lpips = find(flags.lpips) if flags.lpips else None
    files |= {"lpips": named("lpips", identity, lpips)} if lpips else {}
    return Tools(**loaded, lpips=lpips, mask_prompts=TEMPLATES, inverse_covariance=inverse.matrix, hashes=files)


def named(flag: str, load: Callable[..., Loaded], *arguments: object) -> Loaded:
    """What `load` gives; its complaints name the flag."""
    with naming(f"--{flag}"):
        return load(*arguments)


@report
def main(arguments: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    flags = parse(arguments)
    check_inputs(flags)
    from data.dataset import ConceptImages  # after the flags: these take seconds
    from infusion.metrics.report.output import Measured, check_folder, write
    from infusion.metrics.run.cache import Cache
    from infusion.metrics.run.evaluate import check, evaluate
    from infusion.metrics.run.subject import load_subjects
    from infusion.sampling.customised import check_covariance
    from ldm.util.dist import launch
    from scripts.pocket.exact import Exact
    from scripts.pocket.judge import load_classifier

    subjects = describe(flags, load_subjects(flags.personalized_ckpt, flags.labels, flags.groups))
    for subject in subjects:
        if subject.photos_from:  # before what is slow; the model says of what size they are wanted
            ConceptImages(subject.photos_from, 64, subject.concept.superclass, mask="none")
    concepts = [one.concept for subject in subjects for one in subject.checkpoints]
    pocket = concepts[0].architecture == POCKET
    usual = str(usual_file(concepts[0].architecture))
    names = [name or usual for name in one_each(flags.protocol, len(subjects), "protocol")]
    protocols = {name: Protocol.load(name).beside(flags.neighbours or ()) for name in names}
    options = choose(flags, subjects, pocket)
    ranks, device = launch(flags.devices, flags.num_nodes, find_device(flags.device))
    tools = load_tools(flags, options, pocket, device)
    check_covariance(concepts, tools.inverse_covariance)
    sd = load_base(flags, find_config(flags, concepts[0].architecture), concepts, device)
    for concept in concepts:
        concept.check_base(sd.architecture, sd.hash)
    of_files = {one.file: one.concept for subject in subjects for one in subject.checkpoints}
    check_concepts(sd, of_files, tools.inverse_covariance)
    out = Path(flags.out)
    files = {"base": sd.hash or "", **tools.hashes}
    settings = options.shown() | {"architecture": sd.architecture}
    settings |= {"protocols": {name: protocol.as_dict() for name, protocol in protocols.items()}}
    check_folder(out, {subject.label: subject.last.sha256 for subject in subjects}, settings)
    photos, measured = {}, []
    for subject, name in zip(subjects, names, strict=True):
        if folder := subject.photos_from:
            if folder not in photos:
                images = ConceptImages(folder, sd.image_size, subject.concept.superclass, mask="none").images
                photos[folder] = (images + 1) / 2
            subject = subject.with_photos(photos[folder], folder)
        if options.wants("exact") and subject.exact:
            subject = replace(subject, exact=Exact(subject.exact.name, load_classifier(), tools.clipseg))
        check(subject, protocols[name], options, tools)
        measured.append((subject, name))
    command = shlex.join(["python", "scripts/metrics.py", *(sys.argv[1:] if arguments is None else arguments)])
    with locked(out) if ranks.first else nullcontext():
        cache = Cache(flags.cache or out / CACHE, progress=True, ranks=ranks)
        results = [
            evaluate(sd, subject, protocols[name], options, cache, tools) | {"protocol": name}
            for subject, name in measured
        ]
        if ranks.first:
            logger.info("open %s", write(out, Measured(results, settings, files, command)))


if __name__ == "__main__":
    main()
