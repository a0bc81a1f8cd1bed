"""Captions of photos."""

import pytest

from data.captions import Caption, caption_warnings, captions_of, read_captions
from data.photos import PhotoFolder
from ldm.models.tokenizer import Tokenizer
from ldm.util.cli import UserError


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer()


@pytest.mark.parametrize(
    ("text", "noun", "expected"),  # the last: line, template, and whether the line names the concept
    [
        ("A Cat by a catalogue\n\n a {} \n", "cat", [(1, "A {} by a catalogue", True), (3, "a {}", True)]),
        ("my stuffed  animal", "stuffed animal", [(1, "my {}", True)]),
        ("\n \t\ncats\r\na cat", "cat", [(3, "{}, cats", False), (4, "a {}", True)]),
        ("on grass, 4k", "dog", [(1, "{}, on grass, 4k", False)]),
        ("# a dog\n\n\n// dog\n", "dog", [(1, "# a {}", True), (4, "// {}", True)]),  # there are no comments
        ("\ufeffa dog\u2028on grass\n\x0c\na dog", "dog", [(1, "a {}\u2028on grass", True), (3, "a {}", True)]),
        ("\n\n", "dog", []),
    ],
)
def test_captions_name_the_concept_by_its_superclass(tmp_path, text, noun, expected):
    path = tmp_path / "a.txt"
    path.write_text(text, encoding="utf-8", newline="")
    assert read_captions(path, noun) == [Caption(path, *own) for own in expected]


def test_each_photo_has_its_own(photos):
    (photos / "0.txt").write_text("\na cat")
    (photos / "2.caption").write_text("on grass")
    found = captions_of(PhotoFolder.read(photos), "cat")
    first, last = Caption(photos / "0.txt", 2, "a {}"), Caption(photos / "2.caption", 1, "{}, on grass", named=False)
    assert found == [[first], [], [last]] and first.place == f"{photos}/0.txt:2"


def test_other_braces_are_refused_by_line(tmp_path):
    (tmp_path / "a.txt").write_text("a dog\n\na dog {on grass}\n")
    with pytest.raises(
        UserError, match="^.*/a.txt:3: 'a dog {on grass}' has other braces than {}, which is the concept$"
    ):
        read_captions(tmp_path / "a.txt", "dog")


READ = "a {} " + "red " * 73  # all that is read of a caption
UNNAMED = "captions name no 'dog' and get `{}, ` before them: "
LONG = "1 captions have more than the 75 tokens that training reads; lost: "
FOREIGN = "'(sky:1.2)', 'BREAK': syntax of other tools, which is read as plain text here"


@pytest.mark.parametrize(
    ("text", "noun", "expected"),  # P is the file
    [
        ("a dog\n\na {} on grass", "dog", []),
        ("\non grass\n\n\nin snow", "dog", [f"2 {UNNAMED}P:2: 'on grass'; P:5: 'in snow'"]),
        ("a\n" * 5, "dog", [f"5 {UNNAMED}P:1: 'a'; P:2: 'a'; P:3: 'a'; …"]),
        (f"a dog\n\n{READ}on grass\n", "dog", [f"{LONG}P:3: 'on grass'"]),
        (READ, "dog", []),
        (READ, "sks dog", [f"{LONG}P:1: 'red'"]),  # a token more
        ("a {}\na {}, (sky:1.2)\n\na {} BREAK", "dog", [f"P:2; P:4: {FOREIGN}"]),
    ],
)
def test_what_training_does_not_read_as_it_stands_is_told_by_file_and_line(tmp_path, tokenizer, text, noun, expected):
    path = tmp_path / "a.txt"
    path.write_text(text)
    found = caption_warnings(read_captions(path, "dog"), "dog", noun, tokenizer)
    assert found == [line.replace("P:", f"{path}:") for line in expected]
