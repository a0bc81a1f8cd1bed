"""Prompts with a placeholder, such as "a photo of a {}", and the nouns that take its place."""

import re
from collections.abc import Iterable, Iterator, Sequence

from ldm.util.cli import UserError

LONGEST, WORD = 20_000, 4000  # characters of a filled prompt, and of one word: tokenizing takes the square of it
PLACEHOLDER = re.compile(r"\{(\d*)\}")  # "{}" for the only concept, "{1}", "{2}" for several
ARTICLE = re.compile(r"(?<!\w)([Aa])n?(\s+)\Z")  # right before a placeholder
OF_A_NOUN = re.compile(r"\A\s*(an?|the)\s+(?=\S)", re.IGNORECASE)
FOREIGN = re.compile(  # of other tools: weights, networks, alternatives, wildcards, quotes around all, escapes
    r"\([^()]*:\s*\d*\.?\d+\s*\)|\bBREAK\b|<\w+:[^<>]*>|\(\([^()]*\)\)|\[[^\[\]]+\]|\{[^{}]*\|[^{}]*\}|(?<![\w.])__\w+__(?!\w)"
    r'|\A\s*"[^"]*"\s*\Z'
    r"|\bembedding:\w+|\\[()]"
)
VOWEL = re.compile(r"(?!eu|ewe|one\b|u(ni|se|te|ku))[aeiou]|hour|heir|hono|hones", re.IGNORECASE)  # as it is spoken


def check_template(name: str, template: str) -> None:
    """Raises UserError, which begins with the name, unless a training prompt has `{}` and no other braces."""
    if "{}" not in template or set("{}") & set(template.replace("{}", "")):
        raise UserError(f"{name}: {template!r} must have {{}} for the concept, and no other braces")


def fill(template: str, nouns: Sequence[str]) -> str:
    """The template with each placeholder replaced by its noun: "a {}" becomes "an elephant", "an {}" becomes "a cat".

    Raises:
        ValueError: a placeholder of no concept, `LONGEST` characters in all, or a word of `WORD`.
    """
    parts = filled_parts(template, nouns)
    if (length := sum(map(len, parts))) > LONGEST:
        raise UserError(f"{short(template)} has {length:,} characters once {{}} is filled in; at most {LONGEST:,} are")
    filled = "".join(parts)
    if (longest := max(map(len, filled.split()), default=0)) > WORD:
        raise UserError(f"{short(template)} has a word of {longest:,} characters; at most {WORD:,} are taken")
    return filled


def filled_parts(template: str, nouns: Sequence[str]) -> list[str]:
    """Text, noun, text, noun, …, text: what a filled template consists of, with the article that each noun has."""
    parts, last = [], 0
    for match, concept in placeholders(template, len(nouns)):
        n = "n" if VOWEL.match(nouns[concept].strip()) else ""
        parts += [ARTICLE.sub(rf"\1{n}\2", template[last : match.start()]), nouns[concept]]
        last = match.end()
    return [*parts, template[last:]]


def placeholders(template: str, concepts: int) -> Iterator[tuple[re.Match[str], int]]:
    """Each placeholder of the template with the index of its concept."""
    for match in PLACEHOLDER.finditer(template):
        number = match.group(1)
        if not number and concepts > 1:
            raise UserError(f"{{}} in {short(template)} could be any of {concepts} concepts: write {{1}}, {{2}} …")
        concept = int(number[:5] or 1) - 1
        if len(number) > 4 or not 0 <= concept < concepts:
            named = f"{match.group()[:20]} in {short(template)}"
            raise UserError(f"{named} names no concept: there are {concepts}, counted from 1")
        yield match, concept


def bare(noun: str) -> str:
    """A noun without its article: templates have their own."""
    return OF_A_NOUN.sub("", noun)


def foreign(text: str) -> list[str]:
    """What in a text is syntax of other tools, such as `(sky:1.2)`; here it is read as letters."""
    return [found[0] for found in FOREIGN.finditer(text)]


def foreign_warning(texts: Iterable[str]) -> str:
    """One line about the foreign syntax of some texts; "" where there is none."""
    found = list(dict.fromkeys(part for text in texts for part in foreign(text)))
    if not found:
        return ""
    shown = ", ".join(map(short, found[:5])) + (" …" if len(found) > 5 else "")
    return f"{shown}: syntax of other tools, which is read as plain text here"


def short(text: str) -> str:
    """A text as messages show it."""
    return repr(text) if len(text) <= 80 else f"{text[:77]!r} …"
