"""The classes that a config may name under `target:`. A config comes from anyone; a class is code.

Own classes are those of the kinds in `KINDS`, wherever a package of ours defines them, and those in `PLAIN`. Of other
packages there are the few in `OTHERS`. Nothing else is imported for a config's sake, and no file of ours in which no
such class is written.
"""

import ast
import importlib
import inspect
import re
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from ldm.util.includes import ROOT

OWN = ("ldm", "infusion", "clipseg", "data")
KINDS = {  # classes of these kinds hold what they are given: none opens a file or starts a process when it is built
    "torch.nn.modules.module.Module",
    "pytorch_lightning.core.datamodule.LightningDataModule",
    "pytorch_lightning.callbacks.callback.Callback",
    "infusion.methods.base.Method",
}
PLAIN = {  # of no such kind; the first four read files that a config names: images and safetensors
    *("data.dataset.ConceptImages", "infusion.covariance.InverseCovariance", "infusion.training.best.Networks"),
    *(
        "data.prior.ClassImages",
        "infusion.gate.Gate",
        "ldm.diffusion.schedule.Schedule",
        "ldm.models.tokenizer.Tokenizer",
    ),
}
OTHERS = {
    "pytorch_lightning.callbacks.EMAWeightAveraging",
    "pytorch_lightning.callbacks.EarlyStopping",
    "pytorch_lightning.callbacks.LearningRateMonitor",
    "transformers.CLIPSegConfig",
}
# parameters that a config does not set: class -> names; a run's files go to its own folder
CLOSED = {
    "infusion.training.trainer.SaveConcept": ("dirpath",),
    "transformers.models.clipseg.configuration_clipseg.CLIPSegConfig": ("dtype",),
}
# parameters that name a file to write, which has to lie under the working directory
WRITTEN = {"data.pocket.module.LatentWorldData": ("cache",)}
# parameters that are configs of their own: class -> name -> the class of that config
PARTS = {"transformers.CLIPSegConfig": {"text_config": "CLIPSegTextConfig", "vision_config": "CLIPSegVisionConfig"}}
NAME = re.compile(r"(?!.*__)[a-zA-Z]\w*(\.[a-zA-Z]\w*)+", re.ASCII)


class UnknownTarget(ValueError):
    """A target that is none; one line that says why."""


def find_class(target: object) -> type:
    """The class that a config names.

    Raises:
        UnknownTarget: it is none that configs may name, or there is none.
    """
    if not isinstance(target, str) or not NAME.fullmatch(target) or len(target) > 200:
        raise UnknownTarget(f"`{str(target)[:80]}` is not a class of {', '.join(OWN)}")
    package, (module, _, name) = target.split(".")[0], target.rpartition(".")
    if target in OTHERS:
        return getattr(importlib.import_module(module), name)
    if package not in OWN:
        raise UnknownTarget(f"`{target}` is not a class of {', '.join(OWN)}, and none of {', '.join(sorted(OTHERS))}")
    written = classes_in(source_of(module))
    if name not in written:
        close = get_close_matches(name, written, n=1)
        raise UnknownTarget(f"`{module}` has no class `{name}`" + (f"; did you mean `{close[0]}`?" if close else ""))
    unknown = UnknownTarget(f"`{target}` is no class for configs: it is neither module, data, callback nor method")
    if target not in PLAIN and not written[name]:
        raise unknown
    try:
        found = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise UnknownTarget(f"`{module}` cannot be imported here ({error})") from error
    kinds = {f"{base.__module__}.{base.__qualname__}" for base in found.__mro__}
    if target not in PLAIN and not kinds & KINDS:
        raise unknown
    return found


def source_of(module: str) -> Path:
    """The file of a module of ours, without importing any; raises UnknownTarget if there is none."""
    path = ROOT.joinpath(*module.split("."))
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file() and file.resolve().is_relative_to(ROOT):
            return file
    raise UnknownTarget(f"there is no module `{module}`")


@cache
def classes_in(file: Path) -> dict[str, bool]:
    """The public classes that a file defines at its outermost level, and whether each builds on another class."""
    body = ast.parse(file.read_text(encoding="utf-8")).body
    classes = [node for node in body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    return {node.name: bool(node.bases) for node in classes}


def full_name(cls: type) -> str:
    """As configs write it."""
    names = [target for target in OTHERS if target.rpartition(".")[2] == cls.__name__]
    return names[0] if names and cls.__module__.split(".")[0] not in OWN else f"{cls.__module__}.{cls.__qualname__}"


def refuse_param(cls: type, name: str, value: Any) -> str:
    """Why a config may not give a class this parameter; "" where it may."""
    if any(name in CLOSED.get(f"{base.__module__}.{base.__qualname__}", ()) for base in cls.__mro__):
        return "is not for configs to set"
    if name in WRITTEN.get(full_name(cls), ()) and not Path(str(value)).resolve().is_relative_to(Path.cwd().resolve()):
        return f"a file is written to {str(value)[:80]!r}: name one under the working directory"
    part = PARTS.get(full_name(cls), {}).get(name)
    if part and isinstance(value, dict):  # what else there is names kernels, types, files to fetch
        known = {*inspect.signature(getattr(inspect.getmodule(cls), part)).parameters, "model_type"} - {"dtype"}
        for key in value:
            if key not in known and value[key] not in (None, False, ""):
                return f"`{key}` is not for configs to set"
    return ""


def refusals(cls: type) -> tuple[type[Exception], ...]:
    """What a class raises for parameters of which it cannot be built, beside ValueError."""
    usual = (TypeError, LookupError, ArithmeticError, AttributeError, AssertionError, RuntimeError)
    if full_name(cls) not in PARTS:
        return usual
    from huggingface_hub.errors import StrictDataclassError  # not above: few configs need it

    return (*usual, StrictDataclassError)
