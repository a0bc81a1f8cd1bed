"""YAML configs: how files become one config, and a config becomes objects.

A file may name others under `include:` (one or a list, relative to the file); they are merged before it. A mapping with
the keys `target` (a class) and `params` (its arguments) stands for an object. By convention
- `configs/backbone/*.yaml` hold the node `sd` (target `ldm.pipeline.StableDiffusion`), `ckpt` (its usual file) and
  `ckpt_source` (where that file comes from),
- an entry file includes a backbone and refers to it as `${sd}`, or to a part of it as `${sd.params.vae}`,
- every other top-level key exists to be referred to (`superclass: cat` … `${superclass}`); one that nobody refers to is
  an error.
"""

import inspect
import re
import types
import typing
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.util import yamlfile
from ldm.util.errors import suggestion
from ldm.util.includes import ROOT, with_included
from ldm.util.references import Endless, measure
from ldm.util.targets import OTHERS, UnknownTarget, find_class, full_name, refusals, refuse_param
from ldm.util.yamlfile import NotPlain

BACKBONES = ROOT / "configs" / "backbone"
KEY = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+|\[\d{1,6}\])*", re.ASCII)  # of an override


class ConfigError(ValueError):
    """A mistake in a config; the message names the config path."""


def load_config(
    paths: str | Path | Iterable[str | Path], overrides: Sequence[str] = (), defaults: dict[str, Any] | None = None
) -> DictConfig:
    """Merges `defaults` and files from left to right (each after what it includes), then `key.path=value` overrides.

    Files are read as what a stranger may have written (`ldm.util.yamlfile`): plain values, and `${key}` for another key
    of the config. They include files of the repository's `configs` and of their own folder, and of no other.

    Raises ConfigError for a file that is missing, malformed or too large, for an include that is circular or elsewhere,
    for references without an end, and for an override whose first key is not there.
    """
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    config = OmegaConf.create(defaults or {})
    for path in paths:
        for file, values in _read(Path(path)):
            config = _merged(config, values, file)
    for word in overrides:
        override(config, word)
    return config


def override(config: DictConfig, word: str) -> None:
    """Sets `key.path=value`; raises ConfigError for anything else, and for a first key that is not there."""
    key, sign, text = word.partition("=")
    shown = f"override `{word[:80]}`"
    if not sign or not key:
        raise ConfigError(f"{shown}: write it as key=value")
    if not KEY.fullmatch(key) or len(key) > 200:
        raise ConfigError(
            f"{shown}: `{key[:80]}` is no key; write it as key=value, with a key such as data.params.seed"
        )
    top = re.split(r"[.\[]", key)[0]
    if top not in config.keys():  # noqa: SIM118 (`in config` leaves out what is open: ???)
        hint = suggestion(top, [str(name) for name in config])
        raise ConfigError(f"{shown}: the config has no key `{top}`{hint}")
    try:
        OmegaConf.update(config, key, yamlfile.value(text), force_add=True)
        measure(OmegaConf.to_container(config))
    except (OmegaConfBaseException, AttributeError, TypeError, LookupError, ValueError) as error:
        raise ConfigError(f"{shown}: {_first_line(error)}") from error


def _read(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    try:
        return with_included(path)
    except NotPlain as error:
        raise ConfigError(str(error)) from error


def _merged(config: DictConfig, values: dict[str, Any], file: Path) -> DictConfig:
    try:
        measure(values)
        config = OmegaConf.merge(config, OmegaConf.create(values))
        measure(OmegaConf.to_container(config))
        return config
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        raise ConfigError(f"{file}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


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
    """A copy without interpolations, in which nothing is left that would become one.

    Raises ConfigError for an interpolation that leads nowhere, has no end or is put together of others, and for a value
    left open (`???`).
    """
    try:
        measure(OmegaConf.to_container(config))
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        _refuse_references(values, "")
        return OmegaConf.create(values)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or 'config'}: {_first_line(error)}") from error
    except Endless as error:
        raise ConfigError(str(error)) from error


def _refuse_references(value: Any, path: str) -> None:
    for key, child in value.items() if isinstance(value, dict) else enumerate(value):
        where = _join(path, key)
        if isinstance(child, dict | list):
            _refuse_references(child, where)
        elif isinstance(child, str) and "${" in child:
            raise ConfigError(f"{where}: `${{` is left in it once every `${{key}}` is replaced; write it without")


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
        raise ConfigError(f"{path}: a mapping of names to values is wanted, not {_short(params)}")
    signature = inspect.signature(cls).parameters
    named = [name for name, p in signature.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in signature.values()) and full_name(cls) not in OTHERS
    unknown = [str(name)[:100] for name in params if name not in named]
    if unknown and not open_ended:
        hint = suggestion(unknown[0], named)
        raise ConfigError(f"{_join(path, unknown[0])}: {cls.__name__} has no parameter `{unknown[0]}`{hint}")
    missing = [name for name in named if signature[name].default is inspect.Parameter.empty and name not in params]
    if missing:
        raise ConfigError(f"{path}: {cls.__name__} also needs {', '.join(f'`{name}`' for name in missing)}")
    hints = _hints(cls)
    for name, value in params.items():
        check(value, _join(path, name))
        if refused := refuse_param(cls, name, value):
            raise ConfigError(f"{_join(path, name)}: {refused}")
        if not _fits(value, hints.get(name, Any)):
            wanted = inspect.formatannotation(hints[name]).replace("typing.", "")
            raise ConfigError(f"{_join(path, name)}: {cls.__name__} wants {wanted} here, not {_short(value)}")


def build(node: Any, path: str = "", given: dict[str, Any] | None = None) -> Any:
    """Turns a config node into objects, children first; mappings, lists and plain values stay what they are.

    Args:
        node: a node, a mapping or list that holds nodes, or a value.
        path: where the node stands in the config, for messages.
        given: parameters of the node that are built already; they take the place of the node's own.

    Raises ConfigError, before anything is built, for a target that `ldm.util.targets` does not know, and for an
    unknown, missing or mistyped parameter; later, for parameters of which a class cannot be built.
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
    try:
        return cls(**params)
    except refusals(cls) as error:
        if "memory" in str(error):  # which is no mistake in the config
            raise
        reason = f"no {cls.__name__} can be built of these ({_first_line(error)})"
        raise ConfigError(f"{_join(path, 'params')}: {reason}") from error


def _check_node(node: dict, path: str) -> None:
    for key in node:
        if key not in ("target", "params"):
            raise ConfigError(f"{_join(path, key)}: a node has the keys `target` and `params` only")


def _locate(target: object, path: str) -> type:
    try:
        return find_class(target)
    except UnknownTarget as error:
        raise ConfigError(f"{_join(path, 'target')}: {error}") from error


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
    return f"{path}.{str(key)[:100]}" if path else str(key)[:100]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
