"""What a training is given in words, checked by the tokenizer alone."""

import pytest

from infusion.training.words import check_caption, check_samples, check_training_words
from ldm.util.cli import UserError

RED = "red " * 74  # one token less than a window has


@pytest.mark.parametrize(
    ("superclass", "noun", "templates", "message"),
    [
        ("cat", "cat", ["a {}", RED + "{}"], None),
        ("cat", "sks cat", [RED + "{}"], "templates: .* is too long for training: 'cat' is beyond"),
        ("cat", "cat", ["red " + RED + "{}"], "lies wholly beyond the 75 tokens"),
        ("cat", "cat", [], "templates: a concept needs its training prompts"),
        (" ", "sks", ["a {}"], "superclass: a concept needs a superclass word"),
        ("\u200b", "\u200b", ["a {}"], "superclass: has the character"),
        ("cat", "cat", ["a cat"], "has no {} for the concept"),
    ],
)
def test_templates_are_read_whole(tokenizer, superclass, noun, templates, message):
    if message is None:
        check_training_words(tokenizer, superclass, noun, templates)
    else:
        with pytest.raises(UserError, match=message):
            check_training_words(tokenizer, superclass, noun, templates)


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        ("a {} " + RED + "on grass", None),  # what is cut behind the concept is a warning
        (RED + "{}", None),
        (RED + "red {} on grass", "{} in .* lies wholly beyond the 75 tokens .*; 'cat on grass' is beyond"),
        ("two {}s", "{} in 'two {}s' is glued to its neighbours: 'cat' is not a word of its own in 'two cats'"),
    ],
)  # fmt: skip
def test_a_caption_has_a_place_for_the_concept(tokenizer, caption, message):
    if message is None:
        check_caption(tokenizer, caption, "cat")
    else:
        with pytest.raises(UserError, match=message):
            check_caption(tokenizer, caption, "cat")


def test_samples_may_be_longer_than_training_reads_but_not_than_is_drawn(tokenizer):
    check_samples(tokenizer, ["a {}", "red " * 590 + "{}"], "cat")
    with pytest.raises(UserError, match="longer than the 600 tokens that are read"):
        check_samples(tokenizer, ["red " * 610 + "{}"], "cat")
