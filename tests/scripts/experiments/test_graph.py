"""Which tasks an experiment has, and what they are known by."""

from pathlib import Path

import pytest
from PIL import Image

from ldm.training.config import read_config
from main import parse
from scripts import metrics
from scripts.experiments.config import read_experiment
from scripts.experiments.graph import Graph, digest


@pytest.fixture
def graph(experiment, tmp_path, monkeypatch):
    """The graph of the small experiment with other lines and overrides."""
    monkeypatch.setattr("scripts.experiments.config.check_nodes", lambda config: None)  # imports what takes seconds

    def build(more: str = "", *overrides: str, out: Path = tmp_path / "out") -> Graph:
        digest.cache_clear()
        return Graph(read_experiment(str(experiment(more)), overrides, out), out)

    return build


def keys(graph: Graph) -> dict[str, str]:
    """What each task is about -> its key."""
    return {task.shown(): task.key for task in graph.tasks}


def test_every_step_is_there_once(graph):
    found = graph()
    kinds = [task.kind for task in found.tasks]
    assert {kind: kinds.count(kind) for kind in kinds} == {"photos": 2, "class images": 2, "train": 4, "measure": 4}
    assert kinds == sorted(kinds, key=["photos", "class images", "train", "measure"].index)
    training = next(task for task in found.tasks if task.shown() == "train: dreambooth that dog 0")
    assert [task.shown() for task in training.needs] == ["photos: that dog", "class images: dog"]
    config = read_config(parse(list(training.command[2:])))
    assert config.data.params.prior.params.root == str(training.needs[1].result) and config.seed == 0
    assert config.data.params.images.params.data_root == str(training.needs[0].result)
    assert (training.count, training.files) == (4, 1)


def test_steps_are_rows_of_one_training(graph, tiny, tmp_path):
    files = [tiny, "configs/method/infusion.yaml", tmp_path / "recipe.yaml", "configs/with/best.yaml"]
    words = [f"variants.infusion.config=[{','.join(map(str, files))}]", "variants.infusion.step=[2,best,4]"]
    words.append("variants.infusion.overrides=[clip=pocket,callbacks.concept.params.every=2]")
    rows = [row for row in graph("", *words).rows if row.variant.name.startswith("infusion")]
    assert len(rows) == 6 and len({row.made for row in rows}) == 2
    assert [row.label for row in rows[::2]] == [f"infusion {step} · this cat · 0" for step in (2, "best", 4)]
    names = [Path(row.path).relative_to(row.made.result).as_posix() for row in rows[::2]]
    assert names == ["models/step=000002.safetensors", "models/best.safetensors", "models/step=000004.safetensors"]


def test_the_first_row_of_a_noun_is_measured_before_the_others(graph):
    found = graph()
    first = {"cat": found.measures[0], "dog": found.measures[1]}
    assert [task.after for task in found.measures] == [
        () if task in first.values() else (first[row.subject.superclass],)
        for row, task in zip(found.rows, found.measures, strict=True)
    ]


def test_tasks_do_not_depend_on_where_they_are_kept(graph, tmp_path):
    assert keys(graph()) == keys(graph(out=tmp_path / "elsewhere"))


def test_another_photo_repeats_what_depends_on_it_only(graph, tmp_path):
    before = keys(graph())
    Image.new("RGB", (24, 20)).save(tmp_path / "cats/0.png")
    after = keys(graph())
    assert {name for name in before if before[name] != after[name]} == {name for name in before if "this cat" in name}


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("measure.samples=6", {"measure"}),
        ("variants.infusion.overrides=[learning_rate=0.5]", {"train", "measure"}),
        ("masks.model_weight=pocket", {"photos", "train", "measure"}),
        ("cores=2", set()),
        ("seeds=[0,1]", set()),
    ],
)
def test_what_changes_is_repeated(graph, override, changed):
    before = keys(graph())
    more = "masks: {model_weight: other}" if override.startswith("masks") else ""
    after = keys(graph(more, override))
    assert {name.split(":")[0] for name in before if before[name] != after[name]} == changed


def test_the_weights_count(graph, tiny):
    before, content = keys(graph()), tiny.with_suffix(".safetensors").read_bytes()
    try:
        tiny.with_suffix(".safetensors").write_bytes(content[:-1] + b"x")
        after = keys(graph())
    finally:
        tiny.with_suffix(".safetensors").write_bytes(content)
    unchanged = {name for name in before if before[name] == after[name]}
    assert unchanged == {"photos: this cat", "photos: that dog"}


def test_methods_share_the_images_of_a_superclass(graph, tiny):
    few = "overrides: [data.params.prior.params.count=2, data.params.prior.params.steps=2]"
    found = graph("", f"variants.custom={{config: [{tiny}, configs/method/custom_diffusion.yaml], {few}}}")
    images = {task for task in found.tasks if task.kind == "class images"}
    assert len(images) == 2 and sum(bool(images & {*task.needs}) for task in found.tasks if task.kind == "train") == 4


def test_rows_from_elsewhere_are_measured_only(graph, tmp_path):
    file = tmp_path / "this cat.safetensors"
    file.write_bytes(b"1")
    (tmp_path / "that dog.safetensors").write_bytes(b"2")
    found = graph("", f"variants.mine={{file: '{tmp_path}/{{subject}}.safetensors'}}")
    assert len(found.measures) == len(found.rows) == 6
    task = found.measures[-2]
    assert task.needs == (found.rows[-2].photos,)
    flags = metrics.parse(list(task.command[2:]))
    assert flags.personalized_ckpt == [str(file)] and flags.labels == ["mine · this cat"]
    before = keys(found)
    file.write_bytes(b"3")
    after = keys(graph("", f"variants.mine={{file: '{tmp_path}/{{subject}}.safetensors'}}"))
    assert {name for name in before if before[name] != after[name]} == {"measure: mine this cat"}


def test_the_report_gathers_the_rows_that_are_there(graph):
    found = graph()
    flags = metrics.parse(list(found.report(found.rows[1:]).command[2:]))
    columns = (flags.personalized_ckpt, flags.labels, flags.groups, flags.images)
    rows = list(zip(*columns, strict=True))
    assert len(rows) == 3 and rows[0][1:3] == ("infusion · that dog · 0", "infusion")
    assert flags.cache == metrics.parse(list(found.measures[0].command[2:])).cache and flags.samples == 4
    assert found.report(found.rows).key != found.report(found.rows[1:]).key


def test_words_and_pictures_are_flags_of_the_measurement(graph, tmp_path):
    (tmp_path / "drawn").mkdir()
    words = [f"variants.other={{pictures: {tmp_path}/drawn}}", "subjects.that dog.superclass=cat"]
    found = graph("", *words, "subjects.this cat.words=a striped cat", "subjects.that dog.words=a dog, spotted")
    flags = metrics.parse(list(found.report(found.rows).command[2:]))
    assert flags.described == ["a striped cat", "a dog, spotted"] and flags.superclass == "cat"
    assert flags.pictures == [(f"other · {name}", f"{tmp_path}/drawn") for name in ("this cat", "that dog")]
    assert len(flags.images) == len(flags.groups) == 6 and len(flags.labels) == 4
    flags = metrics.parse(list(found.measures[-1].command[2:]))
    assert flags.personalized_ckpt == [] and len(flags.images) == 1 and flags.described == ["a dog, spotted"]
