import pytest

from data.pocket.backgrounds import BACKGROUNDS
from data.pocket.world import NOUNS, STYLES
from infusion.metrics.run.protocol import CONTEXT, FOLDER, GROUPS, Protocol, plain
from ldm.models.tokenizer import Tokenizer
from ldm.util.cli import UserError
from ldm.util.config import ROOT
from scripts.pocket.exact import said


@pytest.mark.parametrize("name", ["pocket", "stable_diffusion"])
def test_shipped_files(name):
    protocol = Protocol.load(FOLDER / f"{name}.yaml")
    for superclass in ("elephant", "cat", "backpack", "xylophone"):
        for group in GROUPS:
            prompts = protocol.prompts(group, superclass)
            assert len(prompts) == len(set(prompts)) >= 6
            assert all(("{}" in prompt) == (group == CONTEXT) for prompt in prompts)
            assert "{" not in "".join(plain(prompt, superclass) for prompt in prompts)
            named = [superclass in prompt for prompt in prompts]
            assert all(named) if group == "superclass" else not any(named)
    assert Protocol.of("pocket") == Protocol.load(FOLDER / "pocket.yaml")
    assert Protocol.of("sd15") == Protocol.of("sd21_768") == Protocol.load(FOLDER / "stable_diffusion.yaml")


def test_the_pocket_prompts_say_every_context_of_the_world():
    protocol = Protocol.of("pocket")
    scenes = [said(prompt) for prompt in protocol.concept]
    assert {(scene["background"], scene["style"]) for scene in scenes} == {(b, s) for b in BACKGROUNDS for s in STYLES}
    assert len({scene["place"] for scene in scenes if "place" in scene}) == 5
    assert {noun for row in protocol.kin for noun in row} == set(NOUNS)
    none = " ".join(protocol.none).split()
    assert not set(none) & set(NOUNS)
    tokenizer = Tokenizer(context_length=32, merges=10000)
    assert all(len(tokenizer.encode(prompt)) < 30 for prompt in protocol.prompts(CONTEXT, "elephant"))


def test_words_are_filled_in(protocol):
    assert protocol.prompts(CONTEXT, "owl") == ["a photo of a {}", "a {} on grass"]
    assert protocol.prompts("superclass", "owl") == ["an owl", "an owl in a box"]
    assert protocol.prompts("neighbours", "cat") == ["a dog", "an owl"]
    assert protocol.prompts("none", "cat") == ["grass", "the sea"]
    assert protocol.beside(["wolf", "cat"]).prompts("neighbours", "cat") == ["a wolf"]
    assert plain("a photo of a {}", "owl") == "a photo of an owl" and plain("grass", "owl") == "grass"
    with pytest.raises(ValueError, match="--neighbours: name nouns beside 'teapot'"):
        protocol.prompts("neighbours", "teapot")


def test_prompts_and_neighbours_go_round_together(protocol):
    wide = Protocol(("{}",), ("x",), ("{superclass}",), ("on {neighbour}", "by {neighbour}"), others=("a", "b", "c"))
    assert wide.prompts("neighbours", "cat") == ["on a", "by b", "on c", "by a", "on b", "by c"]


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("concepts: [a]", "unknown key `concepts`; did you mean `concept`"),
        ("concept: ['{}']", "none: at least one prompt is wanted"),
        ("concept: word", "concept: a list of texts is wanted"),
        ("kin: [a, b]", "kin: a list of lists of words"),
        ("concept: [a]\nnone: [b]\nsuperclass: [c]\nneighbours: [d]", "concept: 'a' has no {}"),
        ("concept: ['{}']\nnone: ['a {}']\nsuperclass: ['{superclass}']\nneighbours: ['{neighbour}']", "has a {}"),
        ("concept: ['{}']\nnone: []\nsuperclass: ['{superclass}']\nneighbours: ['{neighbour}']", "none: at least one"),
    ],
)
def test_mistakes_name_the_file(tmp_path, text, complaint):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        Protocol.load(file)
    assert str(error.value).startswith(f"{file}: ") and complaint in str(error.value)


def test_the_prompts_are_said_in_full(protocol):
    assert protocol.as_dict()["kin"] == [["cat", "dog", "owl"]] and protocol.as_dict()["none"] == ["grass", "the sea"]
    assert (ROOT / FOLDER / "pocket.yaml").is_file()
