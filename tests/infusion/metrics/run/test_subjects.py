import json
import shutil
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from infusion.metrics.run.protocol import CONTEXT, FOLDER, PLAIN, Protocol
from infusion.metrics.run.subjects import BenchmarkSubject, custom_concept_101, dreambooth, dreambooth_prompts, read

CLASSES = {  # as dataset/prompts_and_classes.txt of google/dreambooth has them
    "backpack": ["backpack", "backpack_dog"],
    "stuffed animal": ["bear_plushie", "grey_sloth_plushie", "wolf_plushie"],
    "bowl": ["berry_bowl"],
    "can": ["can"],
    "candle": ["candle"],
    "cat": ["cat", "cat2"],
    "clock": ["clock"],
    "sneaker": ["colorful_sneaker", "shiny_sneaker"],
    "dog": ["dog", "dog2", "dog3", "dog5", "dog6", "dog7", "dog8"],
    "toy": ["duck_toy", "monster_toy", "poop_emoji", "rc_car", "robot_toy"],
    "boot": ["fancy_boot"],
    "glasses": ["pink_sunglasses"],
    "cartoon": ["red_cartoon"],
    "teapot": ["teapot"],
    "vase": ["vase"],
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """DreamBooth's layout, with empty files for photos."""
    for name in (name for names in CLASSES.values() for name in names):
        (tmp_path / "dreambooth" / name).mkdir(parents=True)
        (tmp_path / "dreambooth" / name / "00.jpg").touch()
    return tmp_path / "dreambooth"


@pytest.fixture
def custom(tmp_path: Path) -> Path:
    """CustomConcept101's layout, of two subjects."""
    folder, entries = tmp_path / "customconcept101", []
    for name, superclass in (("furniture_table1", "table"), ("plushie_cow", "cow plushie")):
        photos = folder / "benchmark_dataset" / name
        photos.mkdir(parents=True)
        (photos / "1.jpeg").touch()
        entry = {"instance_prompt": f"photo of a <new1> {superclass}", "class_prompt": superclass}
        entry |= {"instance_data_dir": f"./benchmark_dataset/{name}", "class_data_dir": f"./regularization/{name}"}
        entries.append(entry | {"prompt_filename": f"prompts/{name}.txt"})
        (folder / "prompts").mkdir(exist_ok=True)
        (folder / f"prompts/{name}.txt").write_text(f"photo of a {{}}.\n{{}} in ice. \n\na cat by the {{}} {name}\n")
    (folder / "dataset.json").write_text(json.dumps(entries))
    return folder


def test_dreambooth_has_30_subjects_of_15_classes(root):
    found = dreambooth(root)
    shipped = {f"{FOLDER}/dreambooth_{kind}.yaml": kind for kind in ("live", "object")}
    prompts = {file: Protocol.load(file).concept for file in shipped}
    assert [subject.name for subject in found] == sorted(name for names in CLASSES.values() for name in names)
    assert len(found) == 30
    for subject in found:
        assert subject.name in CLASSES[subject.superclass]
        assert subject.photos == root / subject.name
        kind = shipped[subject.protocol]
        assert (kind == "live") == (subject.superclass in ("cat", "dog"))
        assert subject.templates == prompts[subject.protocol] == dreambooth_prompts(kind)
    assert sum("live" in subject.protocol for subject in found) == 9
    assert found[0].as_protocol() == Protocol.load(FOLDER / "dreambooth_object.yaml")


def test_the_prompts_of_objects_and_of_live_subjects():
    objects, live = dreambooth_prompts("object"), dreambooth_prompts("live")
    for prompts in (objects, live):
        assert len(prompts) == len(set(prompts)) == 25
        assert all(prompt.count("{}") == 1 and prompt.count("{") == 1 for prompt in prompts)
    assert objects[:10] == live[:10] and objects[20:] == live[20:]
    assert not set(objects[10:20]) & set(live[10:20])
    assert objects[9:14] == (
        "a {} on top of a purple rug in a forest",
        "a {} with a wheat field in the background",
        "a {} with a tree and autumn leaves in the background",
        "a {} with the Eiffel Tower in the background",
        "a {} floating on top of water",
    )
    assert live[10] == "a {} wearing a red hat" and live[19] == "a {} in a purple wizard outfit"
    assert live[-1] == "a cube shaped {}"


@pytest.mark.parametrize("kind", ["object", "live"])
def test_the_plain_prompts_name_no_class(kind):
    protocol = Protocol.load(FOLDER / f"dreambooth_{kind}.yaml")
    words = " ".join(protocol.none).split()
    assert not set(words) & {word for superclass in CLASSES for word in superclass.split()}
    for superclass in CLASSES:
        assert protocol.prompts(CONTEXT, superclass) == list(dreambooth_prompts(kind))
        assert all(len(protocol.prompts(group, superclass)) >= 6 for group in PLAIN)
        assert not any(superclass in prompt for prompt in protocol.prompts("neighbours", superclass))
        assert sum(superclass in row for row in protocol.kin) == 1


def test_some_subjects_in_the_order_asked_for(root):
    shutil.rmtree(root / "vase")
    assert [(one.name, one.superclass) for one in dreambooth(root, ["wolf_plushie", "cat2"])] == [
        ("wolf_plushie", "stuffed animal"),
        ("cat2", "cat"),
    ]
    with pytest.raises(ValueError, match=r"^vase: there is no photo in .*dreambooth/vase; fetch them"):
        dreambooth(root)
    with pytest.raises(ValueError, match="^DreamBooth has no subject `dog4`; did you mean `dog"):
        dreambooth(root, ["dog4"])
    with pytest.raises(ValueError, match="^the subject cat is named twice"):
        dreambooth(root, ["cat", "dog", "cat"])
    with pytest.raises(ValueError, match="^backpack: there is no photo in .*nowhere/backpack"):
        dreambooth(root / "nowhere")


def test_an_empty_folder_holds_no_photo(root):
    (root / "can/00.jpg").unlink()
    with pytest.raises(ValueError, match=r"^can: there is no photo in .*dreambooth/can"):
        dreambooth(root)


def test_custom_concept_101(custom):
    table, cow = custom_concept_101(custom)
    assert (table.name, table.superclass) == ("furniture_table1", "table")
    assert (cow.name, cow.superclass) == ("plushie_cow", "cow plushie")
    assert table.photos.samefile(custom / "benchmark_dataset/furniture_table1") and table.protocol == ""
    assert cow.templates == ("photo of a {}.", "{} in ice.", "a cat by the {} plushie_cow")
    assert custom_concept_101(custom / "dataset.json") == read(custom) == read(custom / "dataset.json") == [table, cow]
    assert custom_concept_101(custom, ["plushie_cow"]) == [cow]
    with pytest.raises(FrozenInstanceError):
        cow.name = "cow"


def test_their_prompts_are_measured_beside_the_usual_plain_ones(custom):
    usual = Protocol.load(FOLDER / "stable_diffusion.yaml")
    table, cow = (subject.as_protocol() for subject in custom_concept_101(custom))
    assert table.concept[0] == "photo of a {}." and table.superclass == usual.superclass
    assert set(usual.none) - set(table.none) == {"a bowl of fruit on a wooden table"}
    assert cow.none == usual.none


def test_the_layout_is_told_by_the_dataset_file(root, custom):
    assert read(root, ["dog"]) == dreambooth(root, ["dog"])
    assert isinstance(read(root, ["dog"])[0], BenchmarkSubject)
    with pytest.raises(ValueError, match=r"dataset.json has no subject `dog`; known: furniture_table1, plushie_cow"):
        read(custom, ["dog"])


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("{", "cannot be read as JSON"),
        ("{}", "a list of subjects is wanted"),
        ("[]", "a list of subjects is wanted"),
        ("[[]]", r"\[0\] has no `class_prompt`"),
        ('[{"class_prompt": " "}]', r"\[0\] has no `class_prompt`"),
        ('[{"class_prompt": "cat"}]', r"\[0\] has no `instance_data_dir`"),
        ('[{"class_prompt": "cat", "instance_data_dir": "a"}]', r"\[0\] has no `prompt_filename`"),
    ],
)
def test_other_files_are_refused(custom, text, complaint):
    (custom / "dataset.json").write_text(text)
    with pytest.raises(ValueError, match=rf"^{custom}/dataset.json: {complaint}"):
        custom_concept_101(custom)


def test_what_is_missing_is_named(custom, tmp_path):
    file, prompts = custom / "dataset.json", custom / "prompts/plushie_cow.txt"
    for text, complaint in (
        ("\n", "holds no prompt"),
        ("a cow", "'a cow' has not one {}"),
        ("{} {}", "'{} {}' has not"),
    ):
        prompts.write_text(text)
        with pytest.raises(ValueError) as error:
            custom_concept_101(custom)
        assert str(error.value).startswith(f"{prompts}: ") and complaint in str(error.value)
    prompts.unlink()
    with pytest.raises(ValueError, match="plushie_cow.txt: cannot be read as text"):
        custom_concept_101(custom)
    (custom / "benchmark_dataset/furniture_table1/1.jpeg").unlink()
    with pytest.raises(ValueError, match="^furniture_table1: there is no photo in "):
        custom_concept_101(custom)
    file.write_text(json.dumps(json.loads(file.read_text())[:1] * 2))
    with pytest.raises(ValueError, match=r"\[1\] is a second subject called furniture_table1"):
        custom_concept_101(custom)
    with pytest.raises(ValueError, match="dataset.json: cannot be read as text"):
        custom_concept_101(tmp_path)
