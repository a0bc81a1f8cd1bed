"""Captions of photos."""

import pytest

from data.captions import check_captions, read_captions, without_noun
from ldm.models.tokenizer import Tokenizer
from ldm.util.cli import UserError


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer()


@pytest.mark.parametrize(
    ("text", "noun", "templates", "without"),
    [
        ("A Cat beside a catalogue\n\n a photo of {} \n", "cat", ["A {} beside a catalogue", "a photo of {}"], []),
        ("my stuffed  animal", "stuffed animal", ["my {}"], []),
        ("cats\na cat", "cat", ["{}, cats", "a {}"], ["cats"]),
        ("on grass, 4k", "dog", ["{}, on grass, 4k"], ["on grass, 4k"]),
    ],
)
def test_captions_name_the_concept_by_its_superclass(tmp_path, text, noun, templates, without):
    (tmp_path / "a.txt").write_text(text)
    assert read_captions(tmp_path / "a.txt", noun) == (templates, without)
    assert read_captions(tmp_path / "b.txt", noun) == ([], [])


def test_captions_without_the_noun_are_told():
    assert without_noun({"a.txt": [], "b.txt": []}, "dog") == ""
    said = without_noun({"a.txt": ["on grass"], "b.txt": ["in snow", "x" * 200]}, "dog")
    assert said.startswith("3 captions name no 'dog' and get `{}, ` before them: a.txt: 'on grass'; b.txt: 'in snow'")


def test_what_training_does_not_read_of_a_caption_is_told(tokenizer):
    captions = {"a.txt": ["a {} on grass"], "b.txt": ["a {} " + "red " * 73 + "on grass", "{}"], "c.txt": []}
    (line,) = check_captions(captions, "dog", tokenizer)
    assert line == "1 captions have more than the 75 tokens that training reads; lost: b.txt: 'on grass'"
    assert check_captions({"a.txt": ["{} " + "red " * 74]}, "dog", tokenizer) == []


def test_foreign_syntax_in_captions_is_told(tokenizer):
    (line,) = check_captions({"a.txt": ["a {}, (sky:1.2)"], "b.txt": ["a {} BREAK"]}, "dog", tokenizer)
    assert line.startswith("captions: '(sky:1.2)', 'BREAK': syntax of other tools")


@pytest.mark.parametrize("words", [75, 200])
def test_a_concept_beyond_what_training_reads_is_refused(tokenizer, words):
    with pytest.raises(UserError, match="^b.txt: the concept lies beyond the 75 tokens .* shorten the caption by '"):
        check_captions({"a.txt": ["{}"], "b.txt": ["red " * words + "{}"]}, "dog", tokenizer)
    assert check_captions({"b.txt": ["red " * 74 + "{}"]}, "dog", tokenizer) == []
