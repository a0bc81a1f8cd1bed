"""YAML configs: how files become one config, and a config becomes objects.

A file may name others under `include:` (one or a list, relative to the file); they are merged before it. A mapping with
the keys `target` (a class) and `params` (its arguments) stands for an object. By convention
- `configs/backbone/*.yaml` hold the node `sd` (target `ldm.pipeline.StableDiffusion`), `ckpt` (its usual file) and
  `ckpt_source` (where that file comes from),
- an entry file includes a backbone and refers to it as `${sd}`, or to a part of it as `${sd.params.vae}`,
- every other top-level key exists to be referred to (`superclass: cat` … `${superclass}`); one that nobody refers to is
  an error.
"""

import importlib
import inspect
import re
import types
import typing
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.errors import suggestion

PACKAGES = (
    *("ldm", "infusion", "clipseg", "data"),
    *("torch", "pytorch_lightning", "lightning", "transformers", "diffusers"),
)

ROOT = Path(__file__).resolve().parents[1]
BACKBONES = ROOT / "configs" / "backbone"


class ConfigError(ValueError):
    """A mistake in a config; the message names the config path."""


def load_config(
    paths: str | Path | Iterable[str | Path], overrides: Sequence[str] = (), defaults: dict[str, Any] | None = None
) -> DictConfig:
    """Merges `defaults` and files from left to right (each after what it includes), then `key.path=value` overrides.

    Raises ConfigError for a missing or malformed file, a circular include, or an override whose first key is not there.
    """
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    config = OmegaConf.merge(OmegaConf.create(defaults or {}), *(_load(Path(path), ()) for path in paths))
    for override in overrides:
        key, sign, value = override.partition("=")
        top = re.split(r"[.\[]", key)[0]
        if not sign or not top:
            raise ConfigError(f"override `{override}`: write it as key=value")
        if top not in config.keys():  # noqa: SIM118 (`in config` leaves out what is open: ???)
            hint = suggestion(top, [str(name) for name in config])
            raise ConfigError(f"override `{override}`: the config has no key `{top}`{hint}")
        try:
            typed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]))
            OmegaConf.update(config, key, typed["value"], force_add=True)
        except (OmegaConfBaseException, yaml.YAMLError, AttributeError, TypeError) as error:
            raise ConfigError(f"override `{override}`: {error}") from error
    return config


def _load(path: Path, parents: tuple[Path, ...]) -> DictConfig:
    if path.resolve() in parents:
        raise ConfigError(f"{path}: includes itself, by way of {parents[-1]}")
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file" + (f" (included by {parents[-1]})" if parents else ""))
    try:
        config = OmegaConf.load(path)
    except (OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: not a readable YAML file: {error}") from error
    if not isinstance(config, DictConfig):
        raise ConfigError(f"{path}: a config is a mapping of keys to values")
    included = config.pop("include", None) or []
    included = [included] if isinstance(included, str) else list(included)
    parents = (*parents, path.resolve())
    return OmegaConf.merge(OmegaConf.create(), *(_load(path.parent / name, parents) for name in included), config)


def find(path: str | Path) -> Path:
    """A file or folder that a config names: relative to the working directory or else to the repository."""
    path = Path(path)
    return path if path.exists() or not (ROOT / path).exists() else ROOT / path


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
    """A copy without interpolations.

    Raises ConfigError for an interpolation that leads nowhere and for a value left open (`???`).
    """
    try:
        return OmegaConf.create(OmegaConf.to_container(config, resolve=True, throw_on_missing=True))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or 'config'}: {str(error).splitlines()[0]}") from error


def check(node: Any, path: str = "") -> None:
    """Checks a node without building it: targets, names of parameters, and types of plain values, all the way down."""
    if isinstance(node, DictConfig | ListConfig):
        node = OmegaConf.to_container(resolve(OmegaConf.create({"node": node})))["node"]
    if isinstance(node, dict) and "target" in node:
        _check_node(node, path)
        check_params(_locate(node["target"], path), node.get("params") or {}, _join(path, "params"))
    elif isinstance(node, dict | list):
        for key, child in node.items() if isinstance(node, dict) else enumerate(node):
            check(child, _join(path, key))


def check_params(cls: type, params: dict, path: str) -> None:
    """Checks a class's parameters as `check` does: names known, none missing, plain values of the annotated type."""
    if not isinstance(params, dict):
        raise ConfigError(f"{path}: a mapping of names to values is wanted, not {params!r}")
    signature = inspect.signature(cls).parameters
    named = [name for name, p in signature.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in signature.values())
    unknown = [str(name) for name in params if name not in named]
    if unknown and not open_ended:
        hint = suggestion(unknown[0], named)
        raise ConfigError(f"{_join(path, unknown[0])}: {cls.__name__} has no parameter `{unknown[0]}`{hint}")
    missing = [name for name in named if signature[name].default is inspect.Parameter.empty and name not in params]
    if missing:
        raise ConfigError(f"{path}: {cls.__name__} also needs {', '.join(f'`{name}`' for name in missing)}")
    hints = _hints(cls)
    for name, value in params.items():
        check(value, _join(path, name))
        if not _fits(value, hints.get(name, Any)):
            wanted = inspect.formatannotation(hints[name]).replace("typing.", "")
            raise ConfigError(f"{_join(path, name)}: {cls.__name__} wants {wanted} here, not {value!r}")


def build(node: Any, path: str = "", given: dict[str, Any] | None = None) -> Any:
    """Turns a config node into objects, children first; mappings, lists and plain values stay what they are.

    Args:
        node: a node, a mapping or list that holds nodes, or a value.
        path: where the node stands in the config, for messages.
        given: parameters of the node that are built already; they take the place of the node's own.

    Raises ConfigError, before anything is built, for a target outside `PACKAGES` or not a class, and for an unknown,
    missing or mistyped parameter.
    """
    if isinstance(node, DictConfig | ListConfig):
        node = OmegaConf.to_container(resolve(OmegaConf.create({"node": node})))["node"]
    check(node, path)
    return _build(node, path, given or {})


def _build(node: Any, path: str, given: dict[str, Any]) -> Any:
    if isinstance(node, list):
        return [_build(child, _join(path, i), {}) for i, child in enumerate(node)]
    if not isinstance(node, dict):
        return node
    if "target" not in node:
        return {key: _build(child, _join(path, key), {}) for key, child in node.items()}
    cls = _locate(node["target"], path)
    own = {name: child for name, child in (node.get("params") or {}).items() if name not in given}
    params = {name: _build(child, _join(path, f"params.{name}"), {}) for name, child in own.items()} | given
    hints = _hints(cls)
    for name, value in params.items():
        if not _fits(value, hints.get(name, Any)):
            where = _join(path, f"params.{name}")
            raise ConfigError(f"{where}: {cls.__name__} does not take a {type(value).__name__} here")
    return cls(**params)


def _check_node(node: dict, path: str) -> None:
    for key in node:
        if key not in ("target", "params"):
            raise ConfigError(f"{_join(path, key)}: a node has the keys `target` and `params` only")


def _locate(target: str, path: str) -> type:
    where = _join(path, "target")
    if not isinstance(target, str) or target.split(".")[0] not in PACKAGES or "." not in target:
        raise ConfigError(f"{where}: `{target}` is not a class of {', '.join(PACKAGES)}")
    module_name, _, name = target.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(f"{where}: there is no module `{error.name}`") from error
    cls = getattr(module, name, None)
    if not isinstance(cls, type) or cls.__module__.split(".")[0] not in PACKAGES:
        classes = [key for key, value in vars(module).items() if isinstance(value, type)]
        close = get_close_matches(name, classes, n=1)
        hint = f"; did you mean `{close[0]}`?" if close else ""
        raise ConfigError(f"{where}: `{module_name}` has no class `{name}`{hint}")
    return cls


def _hints(cls: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls.__init__)
    except (NameError, TypeError):
        return {}


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
    if isinstance(value, list) and kind is not str and issubclass(kind, Iterable):  # YAML has lists only
        return all(_fits(item, args[0]) for item in value) if args else True
    if isinstance(value, str) and issubclass(Path, kind):
        return True
    return isinstance(value, int | float if kind is float else kind)


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)
