"""YAML that anyone may have written: plain values alone, and no more of them than anyone writes.

The text is gone through event by event, which takes neither recursion nor memory, before a value is made of it.
"""

import re
from itertools import chain
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

SIZE = 2**20  # bytes of a file
NODES = 10_000  # values and keys, each alias counted as what it stands for
DEPTH = 32  # mappings and lists within each other
WORD, TEXT = 100, 2**14  # characters of a key, and of a value
LARGEST = 2**64  # above every number, with all seeds
# `${key.path[0]}`, which stands for another value of the config; what else begins with `${` would run a resolver
REFERENCE = re.compile(r"\$\{\s*([A-Za-z_][\w-]*(?:\.[\w-]+|\[\d+\])*)\s*\}", re.ASCII)
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class NotPlain(ValueError):
    """The text is no YAML, or asks for more than plain values; one short line that says where."""


def read(path: Path) -> dict[str, Any]:
    """The mapping that a file holds; {} where it holds nothing.

    Raises:
        NotPlain: it cannot be read, holds anything else, or `inspect` refuses it.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(SIZE + 1)
    except OSError as error:
        raise NotPlain(f"cannot be read ({error.strerror})") from error
    if len(content) > SIZE:
        raise NotPlain(f"is larger than {SIZE:,} bytes, which no config is")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise NotPlain("not a readable YAML file (it is not UTF-8)") from error
    kind = inspect(text)
    if kind not in (None, "mapping"):
        raise NotPlain(f"a config is a mapping of keys to values, not a {kind}")
    return checked(_made(lambda: OmegaConf.create(text))) if kind else {}


def value(text: str) -> Any:
    """What stands behind the sign of `key=value`; raises NotPlain as `read` does."""
    inspect(text)
    return checked(_made(lambda: OmegaConf.from_dotlist([f"value={text}"])))["value"]


def inspect(text: str) -> str | None:
    """Refuses what a config does not need: tags, several documents, too much, too deep, resolvers.

    Returns:
        What the text is: "mapping", "list" or "value"; None where it is empty.

    Raises:
        NotPlain: something of these, or no YAML.
    """
    kind, documents, nodes = None, 0, 0
    anchors: dict[str, tuple[int, int]] = {}  # name -> nodes within, and how deep
    opened: list[tuple[str | None, int]] = []  # anchors of what is not complete, and the count before it
    heights: list[int] = []  # of these, so far
    try:
        for event in yaml.parse(text, Loader=Loader):
            line, height = event.start_mark.line + 1, 0
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise NotPlain(f"line {line}: a second document begins; a config is one")
            if getattr(event, "tag", None) is not None:
                raise NotPlain(f"line {line}: has a tag, {event.tag[:60]!r}; a config holds plain values alone")
            if isinstance(event, yaml.CollectionStartEvent):
                nodes += 1
                opened.append((event.anchor, nodes - 1))
                heights.append(1)
            elif isinstance(event, yaml.CollectionEndEvent):
                (anchor, before), height = opened.pop(), heights.pop()
                if anchor:
                    anchors[anchor] = (nodes - before, height)
            elif isinstance(event, yaml.ScalarEvent):
                _check_text(event.value, line)
                nodes += 1
                if event.anchor:
                    anchors[event.anchor] = (1, 0)
            elif isinstance(event, yaml.AliasEvent):
                if event.anchor not in anchors:
                    raise NotPlain(f"line {line}: *{event.anchor[:60]} stands for nothing, or for itself")
                within, height = anchors[event.anchor]
                nodes += within
            if heights:
                heights[-1] = max(heights[-1], height + 1)
            if kind is None and isinstance(event, yaml.NodeEvent):
                kind = {yaml.MappingStartEvent: "mapping", yaml.SequenceStartEvent: "list"}.get(type(event), "value")
            if len(opened) + height > DEPTH:
                raise NotPlain(f"line {line}: more than {DEPTH} mappings and lists lie within each other")
            if nodes > NODES:
                raise NotPlain(f"line {line}: more than {NODES:,} values (each alias is as many as it stands for)")
    except yaml.YAMLError as error:
        raise NotPlain(_reason(error)) from error
    return kind


def count(values: Any) -> int:
    """Values of all kinds, the one given included."""
    inner = values.values() if isinstance(values, dict) else values if isinstance(values, list) else ()
    return 1 + sum(map(count, inner))


def checked(values: Any) -> Any:
    """The same values, when every key is a short word and every number finite and of a size that something takes.

    Raises:
        NotPlain: another key or number.
    """
    for one in chain.from_iterable(values.items()) if isinstance(values, dict) else values:
        if isinstance(one, dict | list):
            checked(one)
        elif isinstance(one, int | float) and not abs(one) < LARGEST:  # so with NaN
            raise NotPlain("a number is not finite, or too large")
    if isinstance(values, dict):
        for key in values:
            if not isinstance(key, str):
                raise NotPlain(f"a key is {str(key)[:60]!r}, which YAML does not take for a word: put it into quotes")
            if len(key) > WORD:
                raise NotPlain(f"a key has {len(key):,} characters: {key[:60]!r} …")
    return values


def _made(make: Any) -> Any:
    try:
        return OmegaConf.to_container(make())
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise NotPlain(_reason(error)) from error
    except (ValueError, TypeError, OverflowError) as error:  # such as an integer of thousands of digits
        raise NotPlain(f"not a readable YAML file ({type(error).__name__})") from error


def _check_text(text: str, line: int) -> None:
    if len(text) > TEXT:
        raise NotPlain(f"line {line}: a value of more than {TEXT:,} characters")
    if "${" in REFERENCE.sub(" ", text):
        raise NotPlain(f"line {line}: `${{…}}` stands for another key, such as ${{superclass}}, and for nothing else")


def _reason(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    said = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    where = f"line {mark.line + 1}: " if mark else ""
    return f"not a readable YAML file ({where}{' '.join(str(said).split())[:120]})"
