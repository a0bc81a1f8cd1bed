import pytest
import torch

from infusion.tokens import concept_mask, concept_places, fill, word_pattern
from ldm.models.tokenizer import Tokenizer


def words(tokenizer, template, noun):
    """The tokens under the mask, decoded."""
    prompt, mask = concept_mask(tokenizer, template, noun)
    row = tokenizer([prompt])[0]
    return [tokenizer.table.decoder[int(i)] for i in row[mask]]


@pytest.mark.parametrize(
    "template, noun, expected",
    [
        ("a photo of a {}", "cat", [5]),
        ("{}", "cat", [1]),
        ("{} on the {}", "cat", [1, 4]),
        ("a cat and a {}", "cat", [5]),  # the cat that is written out is not the concept
        ("a photo of a {} sitting", "stuffed animal", [5, 6]),
        ("a {}, red", "cat", [2]),
        ("the {}'s hat", "cat", [2]),
        ("a   photo\tof a {}", "Cat", [5]),
        ("a photo of a cat", "cat", []),
    ],
)
def test_positions(tokenizer, template, noun, expected):
    prompt, mask = concept_mask(tokenizer, template, noun)
    assert prompt == template.replace("{}", noun)
    assert mask.shape == (77,)
    assert mask.nonzero().flatten().tolist() == expected


@pytest.mark.parametrize(
    ("template", "nouns", "prompt"),
    [
        ("a photo of a {}", ["elephant"], "a photo of an elephant"),
        ("a photo of a {}", ["unicorn"], "a photo of a unicorn"),
        ("a photo of a {}", ["umbrella"], "a photo of an umbrella"),
        ("a photo of an {}", ["ukulele"], "a photo of a ukulele"),
        ("a photo of a {}", ["hourglass"], "a photo of an hourglass"),
        ("A {} and an  {}", ["Owl"], "An Owl and an  Owl"),
        ("an {} on grass", ["cat"], "a cat on grass"),
        ("a photo of a {}", ["sks elephant"], "a photo of a sks elephant"),
        ("a {1} and a {2}", ["cat", "owl"], "a cat and an owl"),
        ("a big {}, the {}, {}", ["owl"], "a big owl, the owl, owl"),
    ],
)
def test_the_article_is_the_nouns(tokenizer, template, nouns, prompt):
    filled, places = concept_places(tokenizer, template, nouns)
    assert filled == fill(template, nouns) == prompt
    row = tokenizer([prompt])[0]
    for noun, mask in zip(nouns, places >= 0, strict=True):
        assert set(row[mask].tolist()) == set(tokenizer.encode(noun))


def test_masked_tokens_spell_the_noun(tokenizer):
    assert words(tokenizer, "a {} of the {}", "stuffed animal") == ["stuffed</w>", "animal</w>"] * 2
    small = Tokenizer(merges=300)  # few merges: every word is several tokens
    assert "".join(words(small, "photo of a {} outside", "teapot")) == "teapot</w>"
    assert len(words(small, "photo of a {} outside", "teapot")) > 1


def test_truncation_keeps_what_remains(tokenizer):
    _, mask = concept_mask(tokenizer, "red " * 74 + "{}", "stuffed animal")  # tokens 75 and 76; 76 is the end
    assert mask.nonzero().flatten().tolist() == [75]
    _, mask = concept_mask(tokenizer, "a {} " + "red " * 90 + "{}", "cat")
    assert mask.nonzero().flatten().tolist() == [2]


def test_a_concept_beyond_the_end_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="beyond the 75 tokens that are read.*'cat' is beyond"):
        concept_mask(tokenizer, "red " * 75 + "{}", "cat")


@pytest.mark.parametrize("template", ["a photo of {}s", "a super{}", "un{}like"])
def test_a_glued_placeholder_is_an_error(tokenizer, template):
    with pytest.raises(ValueError, match="glued"):
        concept_mask(tokenizer, template, "cat")


def test_several_concepts(tokenizer):
    prompt, places = concept_places(tokenizer, "a {2} beside a {1} and a {2}", ["cat", "stuffed animal"])
    assert prompt == "a stuffed animal beside a cat and a stuffed animal"
    assert [(row >= 0).nonzero().flatten().tolist() for row in places] == [[6], [2, 3, 9, 10]]
    assert (concept_places(tokenizer, "a {1}", ["cat", "dog"])[1][1] < 0).all()


@pytest.mark.parametrize(
    "template, nouns, message",
    [
        ("a {}", ["cat", "dog"], "any of 2 concepts"),
        ("a {3}", ["cat", "dog"], "names no concept"),
        ("a {0}", ["cat"], "names no concept"),
        ("a {}", [], "at least one noun"),
        ("a {}", ["  "], "no tokens"),
    ],
)
def test_unusable_concepts_are_errors(tokenizer, template, nouns, message):
    with pytest.raises(ValueError, match=message):
        concept_places(tokenizer, template, nouns)


@pytest.mark.parametrize(
    ("template", "noun", "message"),
    [
        ("x" * 5000, "cat", "a word of 5,000 characters"),
        ("{}" * 4000, "cat", "a word of 12,000 characters"),
        ("{} " * 9000, "cat", "has 36,000 characters once"),
        ("x " * 15_000, "cat", "has 30,000 characters once"),
        ("{" + "9" * 5000 + "}", "cat", "names no concept"),
    ],
)
def test_prompts_that_would_take_minutes_are_refused(template, noun, message):
    with pytest.raises(ValueError, match=message) as raised:
        concept_places(Tokenizer(merges=100, context_length=16), template, [noun])
    assert len(str(raised.value)) < 300


def test_placeholders_beyond_the_row_cost_nothing():
    tokenizer = Tokenizer(merges=100, context_length=16)
    encoded = []
    encode = tokenizer.encode
    tokenizer.encode = lambda text: encoded.append(text) or encode(text)
    _, places = concept_places(tokenizer, "{} " * 3000, ["cat"])
    assert (places >= 0).sum() == 14 and len(encoded) < 40


def test_a_prompt_that_is_read_whole_has_its_concepts_in_every_window(tokenizer):
    """Of 75 tokens each, between a begin and an end token of their own."""
    prompt, places = concept_places(tokenizer, "red " * 74 + "{} " + "red " * 80 + "{}", ["stuffed animal"], whole=True)
    ids = tokenizer.windows([prompt])[0]
    assert places.shape == (1, 3 * 77)
    at = (places[0] >= 0).nonzero().flatten().tolist()
    assert at == [75, 77 + 1, 2 * 77 + 1 + 156 - 150, 2 * 77 + 1 + 157 - 150]
    assert places[0, at].tolist() == [0, 1, 0, 1]  # the first noun lies in two windows
    assert ids[places[0] == 0].tolist() == [tokenizer.encode("stuffed")[0]] * 2
    assert ids[places[0] == 1].tolist() == [tokenizer.encode("animal")[0]] * 2


def test_a_short_prompt_is_the_same_whole(tokenizer):
    for template in ("a photo of a {}", "{}", "red " * 74 + "{}"):
        cut, whole = (concept_places(tokenizer, template, ["cat"], whole=which) for which in (False, True))
        assert cut[0] == whole[0] and torch.equal(cut[1], whole[1])


@pytest.mark.parametrize(
    ("prompt", "word", "found"),
    [
        ("a Dog beside a cat", "dog", True),
        ("a stuffed  animal", "stuffed animal", True),
        ("a doghouse", "dog", False),
    ],
)
def test_words_stand_by_themselves(prompt, word, found):
    assert bool(word_pattern(word).search(prompt)) == found
