"""Prompts with the concept in them: a grammar over word lists, or the lines of a file.

A grammar is a YAML file: category -> `templates`, and lists of words by name, as of `data/context/*.yaml`. `{}` in a
template is the concept, `{place}` a word of the list `place`. Lists under `words` are for all categories.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import yaml

from infusion.covariance import read_captions
from ldm.util.cli import UserError, check_range, naming, suggestion
from ldm.util.config import find
from ldm.util.files import read_text

SLOT = re.compile(r"\{(\w+)\}")
Parts = list[list[str]]  # of a template: for each part in order, what can stand there


class ContextPrompts:
    """Draws a category, then one of its prompts, each with the same chance.

    Args:
        path: a grammar (.yaml), or a text file with a prompt on each line.
        without: categories to leave out.
        size: draw from so many prompts only, chosen by `seed`; None draws from all.

    Raises:
        ValueError: the file is missing or no grammar, a prompt has no {} or an unknown list, a category to leave out is
            not there or leaves none, or there are fewer than `size` prompts.
    """

    def __init__(self, path: str | Path, without: Sequence[str] = (), size: int | None = None, seed: int = 0) -> None:
        with naming(str(path)):
            categories = _grammar(find(path)) if str(path).endswith((".yaml", ".yml")) else _lines(find(path))
            for name in without:
                if name not in categories:
                    raise UserError(f"without: there is no category {name!r}{suggestion(str(name), list(categories))}")
            self.categories = [parts for name, parts in categories.items() if name not in without]
            if not self.categories:
                raise UserError("without: leaves no category")
            self.chosen: list[str] | None = None
            if size is not None:
                check_range("size", size, 1, len(self))
                generator, found = torch.Generator().manual_seed(seed), dict[str, None]()
                while len(found) < size:
                    found |= dict.fromkeys(self.draw(size - len(found), generator))
                self.chosen = list(found)

    def __len__(self) -> int:
        """How many prompts there are, before `size`."""
        return sum(_count(parts) for templates in self.categories for parts in templates)

    def draw(self, count: int, generator: torch.Generator) -> list[str]:
        """So many prompts with {} for the concept."""

        def below(end: int) -> int:
            return int(torch.randint(end, (), generator=generator))

        if self.chosen is not None:
            return [self.chosen[below(len(self.chosen))] for _ in range(count)]
        return [self._prompt(self.categories[below(len(self.categories))], below) for _ in range(count)]

    def longest(self) -> Iterator[str]:
        """Of each template, the prompt of the longest words."""
        for templates in self.categories:
            for parts in templates:
                yield "".join(max(words, key=len) for words in parts)

    @staticmethod
    def _prompt(templates: list[Parts], below) -> str:
        index = below(sum(map(_count, templates)))
        for parts in templates:
            if index < _count(parts):
                break
            index -= _count(parts)
        said = []
        for words in parts:
            index, own = divmod(index, len(words))
            said.append(words[own])
        return "".join(said)


def _count(parts: Parts) -> int:
    return math.prod(map(len, parts))


def _lines(path: Path) -> dict[str, list[Parts]]:
    lines = [_parts(line, {}) for line in read_captions(path)]
    if not lines:
        raise UserError("holds no prompts")
    return {"lines": lines}


def _grammar(path: Path) -> dict[str, list[Parts]]:
    try:
        content = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise UserError(f"cannot be read as YAML ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(content, dict) or not all(isinstance(node, dict) for node in content.values()):
        raise UserError("no grammar: categories with `templates` and lists of words are wanted")
    shared, found = content.pop("words", {}), {}
    for category, node in content.items():
        lists = shared | node
        if odd := [name for name, words in lists.items() if not _texts(words)]:
            raise UserError(f"{category}.{odd[0]}: a list of texts is wanted")
        found[category] = [_parts(template, lists) for template in lists.get("templates", ())]
        if not found[category]:
            raise UserError(f"{category}: has no `templates`")
    return found


def _texts(words: object) -> bool:
    return isinstance(words, list) and bool(words) and all(isinstance(word, str) for word in words)


def _parts(template: str, lists: Mapping[str, list[str]]) -> Parts:
    pieces = SLOT.split(template)  # text, name, text, …
    if unknown := [name for name in pieces[1::2] if name not in lists]:
        raise UserError(f"{template!r}: there is no list of words {unknown[0]!r}")
    plain = "".join(pieces[::2])
    if "{}" not in plain or set("{}") & set(plain.replace("{}", "")):
        raise UserError(f"{template!r} must have {{}} for the concept, and no other braces than those of lists")
    return [lists[piece] if i % 2 else [piece] for i, piece in enumerate(pieces)]
