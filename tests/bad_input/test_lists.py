"""Lists of subjects, and prompts for measuring, as others wrote them."""

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.bad_input.test_images import METRICS


@pytest.fixture
def photos(bench) -> Path:
    (bench.folder / "photos").mkdir()
    for i in range(2):
        Image.new("RGB", (64, 64), "red").save(bench.folder / "photos" / f"{i}.png")
    return bench.folder / "photos"


GOOD = {"class_prompt": "dog", "instance_data_dir": "photos", "prompt_filename": "prompts.txt"}
LISTS: dict[str, tuple[str, str]] = {
    "empty": ("", "dataset.json: cannot be read as JSON"),
    "deep": ("[" * 100_000, "dataset.json: cannot be read as JSON"),
    "a number": ("3", "dataset.json: a list of subjects is wanted"),
    "a number for a text": (json.dumps([GOOD | {"class_prompt": 3}]), "dataset.json: [0] has no `class_prompt`"),
    "lines in a noun": (
        json.dumps([GOOD | {"class_prompt": "dog\nrm -r x"}]),
        "dataset.json: [0] has the `class_prompt`",
    ),
    "tab in a folder": (json.dumps([GOOD | {"instance_data_dir": "a\tb"}]), "dataset.json: [0] has the `instance_data"),
    "prompts elsewhere": (json.dumps([GOOD | {"prompt_filename": "/etc/passwd"}]), "dataset.json: [0] has the `prompt"),
    "photos above": (
        json.dumps([GOOD | {"instance_data_dir": "../photos"}]),
        "dataset.json: [0] has the `instance_data",
    ),
    "no photos": (json.dumps([GOOD | {"instance_data_dir": "gone"}]), "gone"),
    "no prompts": (json.dumps([GOOD | {"prompt_filename": "gone.txt"}]), "gone.txt"),
    "twice": (json.dumps([GOOD, GOOD]), "dataset.json: [1] is a second subject called photos"),
}


@pytest.mark.parametrize("case", LISTS)
def test_a_list_of_subjects_that_is_none_is_named(bench, photos, case):
    content, says = LISTS[case]
    (bench.folder / "prompts.txt").write_text("a {} on grass\n")
    (bench.folder / "dataset.json").write_text(content)
    said = f"subjects: {{from: {bench.folder}}}\nvariants: {{demo: configs/pocket_demo.yaml}}\n"
    (bench.folder / "experiment.yaml").write_text(said)
    bench.refuse("experiment", "FOLDER/experiment.yaml", "--out", "FOLDER/out", says=says)


WHOLE = (
    "concept: ['a {}']\nnone: [a tree]\nsuperclass: ['a {superclass}']\nneighbours: ['a {neighbour}']\nothers: [cat]\n"
)
PROTOCOLS: dict[str, tuple[str, str]] = {
    "empty": ("", "p.yaml"),
    "python object": (WHOLE + "kin: !!python/object/apply:os.system ['touch ran']\n", "p.yaml"),
    "misspelt": (WHOLE.replace("neighbours", "neighbors"), "did you mean `neighbours`?"),
    "numbers": (WHOLE.replace("[a tree]", "[1]"), "p.yaml: none: a list of texts is wanted"),
    "no place": (WHOLE.replace("['a {}']", "[a dog]"), "p.yaml: concept: 'a dog' has no {}"),
    "another place": (WHOLE.replace("[a tree]", "['a {}']"), "p.yaml: none: 'a {}' has a {}"),
    "kin of texts": (WHOLE + "kin: [a, b]\n", "p.yaml: kin: a list of lists"),
}


@pytest.mark.parametrize("case", PROTOCOLS)
def test_a_protocol_that_is_none_is_named(bench, photos, case):
    content, says = PROTOCOLS[case]
    (bench.folder / "p.yaml").write_text(content)
    flags = ["--samples", "1", "--steps", "1", "--device", "cpu", "--protocol", "p.yaml"]
    bench.refuse("metrics", *METRICS, *flags, says=says)
    assert not (bench.folder / "ran").exists()
