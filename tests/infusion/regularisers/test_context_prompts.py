import pytest
import torch

from infusion.regularisers.context_prompts import ContextPrompts
from ldm.util.cli import UserError
from ldm.util.config import ROOT


def draw(prompts, count=200, seed=0):
    return prompts.draw(count, torch.Generator().manual_seed(seed))


def test_a_grammar_says_all_that_it_can_and_nothing_else(prompts):
    every = ContextPrompts(prompts)
    said = {f"a photo of a {{}} {place}" for place in ("on grass", "on the beach", "in a box")} | {"the {}"}
    styles = {f"{style} of a {{}} beside a cat" for style in ("an oil painting", "a sketch")}
    assert len(every) == 6 and set(draw(every)) == said | styles
    assert 60 < sum(prompt in styles for prompt in draw(every)) < 140  # categories have the same chance
    assert set(draw(ContextPrompts(prompts, without=["styles"]))) == said


def test_a_set_of_some_prompts_is_the_same_every_time(prompts):
    few = ContextPrompts(prompts, size=3)
    assert len(set(draw(few))) == 3 == len(few.chosen)
    assert few.chosen == ContextPrompts(prompts, size=3).chosen
    assert len(set(draw(ContextPrompts(prompts, size=6)))) == 6
    with pytest.raises(UserError, match="size: must be from 1 to 6"):
        ContextPrompts(prompts, size=7)


def test_the_lines_of_a_file(tmp_path):
    (tmp_path / "lines.txt").write_text("a {} on grass\n\nmy {}, today\n")
    assert set(draw(ContextPrompts(tmp_path / "lines.txt"))) == {"a {} on grass", "my {}, today"}


@pytest.mark.parametrize("name", ["live", "object", "pocket"])
def test_the_grammars_that_are_shipped(name):
    prompts = ContextPrompts(ROOT / f"data/context/{name}.yaml")
    drawn = draw(prompts)
    assert len(prompts) > 500 and len(set(drawn)) > 150
    assert all(prompt.count("{}") == 1 and len(prompt.split()) < 25 for prompt in drawn)


BAD = [
    ("a.txt", "", "holds no prompts"),
    ("a.txt", "a cat\n", "must have {} for the concept"),
    ("a.txt", "a {} {1}\n", "list of words '1'"),
    ("a.txt", None, "cannot be read"),
    ("a.yaml", "- a\n", "no grammar"),
    ("a.yaml", "a: {templates: []}\n", "a.templates: a list of texts"),
    ("a.yaml", "a: {words: [x]}\n", "a: has no `templates`"),
    ("a.yaml", "a: {templates: ['the {place}']}\n", "no list of words 'place'"),
    ("a.yaml", "a: {templates: ['a {']}\n", "must have {}"),
    ("a.yaml", "a: {templates: ['a {} {n}'], n: [1]}\n", "a.n: a list of texts"),
    ("a.yaml", "a: [\n", "cannot be read as YAML"),
    ("a.yaml", None, "cannot be read"),
]


@pytest.mark.parametrize(("name", "content", "says"), BAD)
def test_what_is_no_set_of_prompts_is_refused_by_its_name(tmp_path, name, content, says):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as error:
        ContextPrompts(tmp_path / name)
    assert name in str(error.value) and says in str(error.value)


def test_a_category_that_is_not_there_cannot_be_left_out(prompts):
    with pytest.raises(UserError, match="no category 'style'; did you mean `styles`"):
        ContextPrompts(prompts, without=["style"])
    with pytest.raises(UserError, match="leaves no category"):
        ContextPrompts(prompts, without=["styles", "scenes"])
