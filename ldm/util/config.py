"""YAML configs: how files become one config, and a config becomes objects.

A file may name others under `include:` (one or a list, relative to the file); they are merged before it. A mapping with
the keys `target` (a class, or a class method that makes an object of it) and `params` (its arguments) stands for an
object. By convention
- `configs/backbone/*.yaml` hold the node `sd` (target `ldm.pipeline.StableDiffusion`), `ckpt` (its usual file) and
  `ckpt_source` (where that file comes from),
- an entry file includes a backbone and refers to it as `${sd}`, or to a part of it as `${sd.params.vae}`,
- every other top-level key exists to be referred to (`superclass: cat` … `${superclass}`); one that nobody refers to is
  an error.

A config is code: it can build any class of our packages, so run only what you have read.
"""

import importlib
import inspect
import math
import os
import re
import types
import typing
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.util.cli import UserError, suggestion
from ldm.util.files import read_text

ROOT = Path(__file__).resolve().parents[2]
BACKBONES = ROOT / "configs" / "backbone"
OWN = ("ldm", "clipseg", "data", "infusion")
MARK = "«override»"
TARGETS = (*OWN, "pytorch_lightning.callbacks", "transformers.CLIPSegConfig")  # what a target begins with


class ConfigError(UserError):
    """A mistake in a config; the message names the file or the config path."""


def load_config(
    paths: str | Path | Iterable[str | Path],
    overrides: Sequence[str] = (),
    defaults: dict[str, Any] | None = None,
    keys: type | None = None,
) -> DictConfig:
    """Merges `defaults` and files from left to right (each after what it includes), then `key.path=value` overrides.

    `keys` is a class whose attributes are the top-level keys, see `override`. Raises ConfigError for a file that is
    missing or malformed, a circular include, and an override whose first key is not in the config.
    """
    config = OmegaConf.create(defaults or {})
    for path in [paths] if isinstance(paths, str | Path) else paths:
        for file, values in _read(Path(path)):
            try:
                config = OmegaConf.merge(config, values)
            except (OmegaConfBaseException, TypeError, ValueError) as error:
                raise ConfigError(f"{file}: {_first_line(error)}") from error
    for word in overrides:
        override(config, word, keys)
    return config


def _read(path: Path, parents: tuple[Path, ...] = ()) -> Iterator[tuple[Path, DictConfig]]:
    """The files that a file includes, in order, then the file itself."""
    by = f" (included by {parents[-1]})" if parents else ""
    if path.resolve() in map(Path.resolve, parents):
        raise ConfigError(f"{path}: includes itself, by way of {parents[-1]}")
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file{by}")
    try:
        text = read_text(path)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if not isinstance(root, yaml.MappingNode | None):
            raise ConfigError(f"{path}: a config is a mapping of keys to values")
        values = OmegaConf.create(text)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: not a readable YAML file ({' '.join(str(error).split())[:200]})") from error
    included = values.pop("include", None) or []
    names = [included] if isinstance(included, str) else included
    if not isinstance(names, list | ListConfig) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{path}: include: a file, or a list of files, is wanted")
    for name in names:
        yield from _read(path.parent / name, (*parents, path))
    yield path, values


def override(config: DictConfig, word: str, keys: type | None = None) -> None:
    """Sets `key.path=value`; raises ConfigError for anything else, and for a first key that is not in the config.

    The value is read as YAML. Where the key is for texts or paths alone, it is taken as it stands: a folder may be
    called 123 or [dog]. Whether it is, the classes say whose parameters the key ends in, and `keys`, whose attributes
    are the top-level keys.
    """
    key, sign, text = word.partition("=")
    if not sign or not key:
        raise ConfigError(f"override `{word}`: write it as key=value")
    top = re.split(r"[.\[]", key)[0]
    if top not in config.keys():  # noqa: SIM118 (`in config` leaves out what is open: ???)
        raise ConfigError(f"override `{word}`: the config has no key `{top}`{suggestion(top, list(map(str, config)))}")
    try:
        OmegaConf.update(config, key, _value(config, key, text, keys), force_add=True)
    except (OmegaConfBaseException, yaml.YAMLError, AttributeError, TypeError, LookupError, ValueError) as error:
        raise ConfigError(f"override `{word}`: {_first_line(error)}") from error


def _value(config: DictConfig, key: str, text: str, keys: type | None) -> Any:
    """What `key=text` sets."""
    fault = None
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]
        if value == text:
            return text
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        fault = error
    probe = config.copy()
    OmegaConf.update(probe, key, MARK, force_add=True)
    for name in OmegaConf.missing_keys(probe):
        OmegaConf.update(probe, name, "")
    hints = [hint for hint in _annotations(_plain(probe), keys or Any) if hint is not Any]
    if hints and all(_fits("text", hint) and not _fits([], hint) for hint in hints):
        return None if text in ("", "null") and all(_fits(None, hint) for hint in hints) else text
    if fault is not None:
        raise fault
    return value


def _annotations(node: Any, hint: Any) -> Iterator[Any]:
    """The annotations of all parameters that are `MARK`; of one that has it within, `str`.

    Imports the classes that lie on the way.
    """
    if isinstance(node, str):
        yield hint if node == MARK else str
    for key, child in _items(node) if isinstance(node, dict | list) else ():
        if MARK in str(child):
            params = key == "params" and "target" in node
            yield from _annotations(child, find_class(node["target"]) if params else _within(hint, key))


def _within(hint: Any, key: Any) -> Any:
    """The annotation of an item or attribute of what an annotation allows."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        inner = [_within(arg, key) for arg in typing.get_args(hint)]
        return next((found for found in inner if found is not Any), Any)
    args = [arg for arg in typing.get_args(hint) if arg is not Ellipsis]
    if args:  # dict[str, T], Sequence[T]
        return args[-1]
    return _hints(hint).get(key, Any) if isinstance(hint, type) or inspect.ismethod(hint) else Any


def texts(node: object, path: str = "") -> Iterator[tuple[str, str]]:
    """Every text in nested mappings and lists, with the key that leads to it, such as data.params.mask."""
    if isinstance(node, str):
        yield path, node
    elif isinstance(node, dict | list):
        for key, child in _items(node):
            yield from texts(child, _join(path, key))


def find(path: str | Path) -> Path:
    """A file or folder as a user names it: relative to the working directory or else to the repository; ~ is home."""
    path = Path(path)
    own = path if os.path.exists(path) else Path(os.path.expanduser(path))
    return own if os.path.exists(own) or not os.path.exists(ROOT / own) else ROOT / own


def files_in(text: str) -> list[str]:
    """The files or folders of a flag, with commas between them; one that is there may have commas in its name."""
    names, parts = [], text.split(",") if text.strip() else []
    while parts:
        starts = {end: ",".join(parts[:end]).strip() for end in range(len(parts), 0, -1)}  # the longest first
        end = next((end for end, name in starts.items() if os.path.exists(find(name))), 1)
        names.append(starts[end])
        parts = parts[end:]
    if not all(names):
        raise ArgumentTypeError(f"`{text}` is not a file or folder, nor several with commas between them")
    return names


@cache
def backbones() -> dict[str, dict[str, Any]]:
    """The node `sd` of every config in `configs/backbone`, by its name."""
    nodes = (load_config(path).sd for path in sorted(BACKBONES.glob("*.yaml")))
    return {node.params.name: OmegaConf.to_container(node) for node in nodes}


def refuse_unused(config: DictConfig, used: Iterable[str]) -> None:
    """Raises ConfigError for a top-level key that is neither in `used` nor referred to by another key."""
    raw = str(OmegaConf.to_container(config, resolve=False))
    known = sorted({*used, *re.findall(r"\$\{\s*([\w-]+)", raw)})
    for key in config:
        if key not in known:
            raise ConfigError(f"unknown key `{key}`: nothing refers to it{suggestion(str(key), known)}")


def resolve(config: DictConfig) -> DictConfig:
    """A copy without interpolations; raises ConfigError for one that leads nowhere and for an open value (`???`)."""
    return OmegaConf.create(_plain(config))


def instantiate(node: Any, path: str = "", given: dict[str, Any] | None = None) -> Any:
    """Turns a config node into objects, children first; mappings, lists and plain values stay what they are.

    Args:
        node: a node, a mapping or list that holds nodes, or a value.
        path: where the node stands in the config, for messages.
        given: parameters of the node that are built already; they take the place of the node's own.

    Raises ConfigError before anything is built, as `check` does, and later for a child of another class.
    """
    node = _plain(node)
    check(node, path)
    return _build(node, path, given or {})


def check(node: Any, path: str = "") -> None:
    """Checks a node without building it: targets, names of parameters, and types of plain values, all the way down."""
    node = _plain(node)
    if isinstance(node, dict) and "target" in node:
        if unknown := sorted(node.keys() - {"target", "params"}):
            raise ConfigError(f"{_join(path, unknown[0])}: a node has the keys `target` and `params` only")
        check_params(find_class(node["target"], path), node.get("params") or {}, _join(path, "params"))
    elif isinstance(node, dict | list):
        for key, child in _items(node):
            check(child, _join(path, key))


def check_params(cls: Callable, params: dict[str, Any], path: str) -> None:
    """Checks the parameters of a target as `check` does: names known, none missing, values of the annotated type."""
    if not isinstance(params, dict):
        raise ConfigError(f"{path}: a mapping of names to values is wanted, not {params!r}")
    signature = inspect.signature(cls).parameters
    names = [name for name, p in signature.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for name in params:
        if name not in names:
            hint = suggestion(str(name), names)
            raise ConfigError(f"{_join(path, name)}: {cls.__qualname__} has no parameter `{name}`{hint}")
    missing = [name for name in names if signature[name].default is inspect.Parameter.empty and name not in params]
    if missing:
        raise ConfigError(f"{path}: {cls.__qualname__} also needs {', '.join(f'`{name}`' for name in missing)}")
    hints = _hints(cls)
    for name, value in params.items():
        check(value, _join(path, name))
        if not _fits(value, hints.get(name, Any)):
            wanted = inspect.formatannotation(hints[name]).replace("typing.", "")
            raise ConfigError(f"{_join(path, name)}: {cls.__qualname__} wants {wanted} here, not {value!r}")


def find_class(target: object, path: str = "") -> Any:
    """The class that a config names, or its class method, such as `IdentityFeatures.load`, that makes one.

    Raises ConfigError for one outside `TARGETS`, and where there is none.
    """
    where = _join(path, "target")
    module, _, name = str(target).rpartition(".")
    if module.rpartition(".")[2][:1].isupper():
        cls = find_class(module, path)
        if not isinstance(vars(cls).get(name), classmethod):
            methods = [key for key, value in vars(cls).items() if isinstance(value, classmethod)]
            raise ConfigError(f"{where}: `{module}` has no class method `{name}`{suggestion(name, methods)}")
        return getattr(cls, name)
    if not module or not name or not any(f"{target}.".startswith(f"{allowed}.") for allowed in TARGETS):
        raise ConfigError(f"{where}: `{target}` is not a class of {', '.join(TARGETS)}")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        if not error.name or not f"{module}.".startswith(f"{error.name}."):  # a dependency of the module's
            raise
        raise ConfigError(f"{where}: there is no module `{module}`") from error
    if not isinstance(found, type) or found.__module__.split(".")[0] != module.split(".")[0]:
        classes = [key for key, value in vars(importlib.import_module(module)).items() if isinstance(value, type)]
        raise ConfigError(f"{where}: `{module}` has no class `{name}`{suggestion(name, classes)}")
    return found


def _build(node: Any, path: str, given: dict[str, Any]) -> Any:
    if isinstance(node, list):
        return [_build(child, _join(path, i), {}) for i, child in enumerate(node)]
    if not isinstance(node, dict):
        return node
    if "target" not in node:
        return {key: _build(child, _join(path, key), {}) for key, child in node.items()}
    cls, path = find_class(node["target"]), _join(path, "params")
    own = {name: child for name, child in (node.get("params") or {}).items() if name not in given}
    params = given | {name: _build(child, _join(path, name), {}) for name, child in own.items()}
    hints = _hints(cls)
    for name, value in params.items():
        if not _fits(value, hints.get(name, Any)):
            raise ConfigError(f"{_join(path, name)}: {cls.__qualname__} does not take a {type(value).__name__} here")
    try:
        return cls(**params)
    except UserError as error:
        raise ConfigError(f"{path}: {error}") from error


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value agrees with an annotation; a node not built yet agrees, as does an annotation not understood."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or (isinstance(value, dict) and "target" in value):
        return True
    if origin in (Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is Literal:
        return value in args
    if hint is None:
        return value is None
    kind = origin or hint
    if not isinstance(kind, type) or getattr(kind, "_is_protocol", False):
        return True
    if kind is bool or isinstance(value, bool):
        return isinstance(value, bool) and kind in (bool, object)
    if isinstance(value, list) and issubclass(kind, Iterable) and not issubclass(kind, str | Mapping):  # of YAML
        return all(_fits(item, args[0]) for item in value) if args else True
    if isinstance(value, str) and issubclass(Path, kind):
        return True
    if kind is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, kind)


def _hints(cls: Callable) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls.__init__ if isinstance(cls, type) else cls)
    except (NameError, TypeError):
        return {}


def _plain(node: Any) -> Any:
    """Mappings and lists of OmegaConf as those of Python, with every reference resolved."""
    if not isinstance(node, DictConfig | ListConfig):
        return node
    try:
        return OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or 'config'}: {_first_line(error)}") from error
    except RecursionError as error:
        raise ConfigError("config: a value refers to itself, by way of its `${…}`") from error


def _items(node: dict | list) -> Iterable[tuple[Any, Any]]:
    return node.items() if isinstance(node, dict) else enumerate(node)


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
