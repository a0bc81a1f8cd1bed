"""Words of prompts."""

import pytest

from ldm.util.templates import bare, foreign, foreign_warning


@pytest.mark.parametrize(
    ("text", "noun"),
    [
        ("a dog", "dog"),
        ("An  owl", "owl"),
        ("the stuffed animal", "stuffed animal"),
        ("dog", "dog"),
        ("a", "a"),
        ("anteater", "anteater"),
        ("theatre", "theatre"),
        ("sks a dog", "sks a dog"),
    ],
)
def test_articles_are_taken_off(text, noun):
    assert bare(text) == noun


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a dog (on grass:1.2)", ["(on grass:1.2)"]),
        ("({}:.5)", ["({}:.5)"]),
        ("a BREAK b <lora:x:1> <hypernet:y>", ["BREAK", "<lora:x:1>", "<hypernet:y>"]),
        ("[x] [cat:dog:0.5] ((sky))", ["[x]", "[cat:dog:0.5]", "((sky))"]),
        (r"rex \(dog\) __colour__ {a|b} embedding:x", [r"\(", r"\)", "__colour__", "{a|b}", "embedding:x"]),
        ('"a photo of a {}"', ['"a photo of a {}"']),
        ('a {} that says "hello", it\'s new', []),
        ("a {} (on grass), break; <3, 16:9, {1} and {2}", []),
    ],
)
def test_syntax_of_other_tools_is_found(text, found):
    assert foreign(text) == found


def test_a_warning_is_short():
    assert foreign_warning(["a dog", "a {}"]) == ""
    said = foreign_warning([f"a [{i}]" for i in range(9)] + ["b [0]"])
    assert said.startswith("'[0]', '[1]', '[2]', '[3]', '[4]' …: syntax of other tools")
