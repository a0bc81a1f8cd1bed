"""Mistakes in a config are one line before anything starts; the shipped ones can be built."""

import pytest
from omegaconf import OmegaConf

import main as training
from infusion.methods import method_names
from ldm.training.config import read_config
from ldm.util.cli import UserError
from ldm.util.config import ROOT, check, instantiate
from scripts.experiment import main
from scripts.experiments.config import arguments, read_experiment

SHIPPED = sorted((ROOT / "configs/experiment").glob("*.yaml"))
ABSENT = {  # whose weights or photos are not in the repository
    "pocket_two",
    "pocket_two_recipes",
    "pocket_two_regularisers",
    "dreambooth",
    "sd15",
}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seed=[0]"], "the config has no key `seed`; did you mean `seeds`?"),
        (["seeds=[0,0]"], "seeds are one or more different numbers"),
        (["seeds=[a]"], "seeds: Experiment wants list[int] here"),
        (["subjects.this cat.folder=nowhere"], "subjects.this cat.folder: there is no folder nowhere"),
        (["subjects.this cat.supercls=cat"], "subjects.this cat.supercls: Subject has no parameter `supercls`"),
        (["subjects.third={folder: DOGS}"], "subjects.third: Subject also needs `superclass`"),
        (["subjects.a,b={folder: x, superclass: y}"], "a,b: a name has letters"),
        (["variants.infusion.file=x"], "variants.infusion: give one of config, file and pictures"),
        (["variants.infusion.config=nowhere.yaml"], "variants.infusion: nowhere.yaml: no such config file"),
        (["variants.infusion.overrides=[learnin_rate=1]"], "did you mean `learning_rate`?"),
        (["variants.infusion.overrides=[model.params.method.params.key=1]"], "Infusion has no parameter `key`"),
        (["variants.infusion.overrides=[ckpt=nowhere.ckpt]"], "there is no file nowhere.ckpt"),
        (["variants.mine.file=nowhere.safetensors"], "variants.mine: --file: there is no file nowhere.safetensors"),
        (["masks.model_weight=nowhere"], "masks: --model_weight: there is no file nowhere"),
        (["masks.modl=x"], "masks: unrecognized arguments: --modl x"),
        (["measure.sampels=3"], "measure: unrecognized arguments: --sampels 3"),
        (["measure.dino=nowhere"], "measure: --dino: there is no file nowhere"),
        (["measure.out=x"], "measure: out: each row has its own; leave it out"),
        (["variants.drawn.pictures=."], "measure: with pictures: name the base model by `config`, and take subjects"),
        (["variants.infusion.trials={seed: 3}"], "variants.infusion.trials: a mapping of keys to lists"),
        (["variants.infusion.step=3"], "step: `best` or a multiple of callbacks.concept.params.every (100), not 3"),
        (["variants.infusion.step=best"], "step: no best step is marked: add configs/with/best.yaml"),
        (["cores=0"], "cores must be at least 1"),
        (["--only", "lora"], "--only: there is no variant or subject `lora`"),
    ],
)
def test_mistakes_are_one_line(words, message, experiment, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(experiment()), "--out", str(tmp_path / "out"), *words])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and message in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


LONG = "red " * 30  # more than the tiny model reads of a caption


@pytest.mark.parametrize(
    ("file", "text", "words", "message"),
    [
        ("dogs/1.txt", "a dog\n\ntwo {}s", [], "dogs/1.txt:3: {} in 'two {}s' is glued to its neighbours: 'dog' is"),
        ("dogs/0.caption", f"\n{LONG} dog", [], "dogs/0.caption:2: {} in 'red red"),
        ("cats/2.txt", "a cat {in a box}", [], "cats/2.txt:1: 'a cat {in a box}' has other braces than {}"),
        (None, "", ["subjects.this cat.superclass= "], "subjects.this cat: superclass: a concept needs a superclass"),
        (None, "", [f"subjects.this cat.superclass={LONG}"], "subjects.this cat: templates: 'a photo of a red"),
        (None, "", [f"variants.infusion.overrides=['templates=[\"{LONG}{{}}\"]']"], "lies wholly beyond the 14 tokens"),
        (None, "", [f"subjects.this cat.overrides=['templates=[\"{LONG}{{}}\"]']"], "lies wholly beyond the 14 tokens"),
        (
            None,
            "",
            [f"variants.dreambooth.overrides=['data.params.prior.params.prompt={LONG}']"],
            "prior: prompt: 'red",
        ),
        (
            "recipe.yaml",
            "callbacks: {samples: {params: {prompts: ['some {}s']}}}",
            [],
            "callbacks.samples: prompts: {} in",
        ),
        ("protocol.yaml", f"none: ['{LONG * 5}']", [], "protocol.yaml: 'red red"),
        (None, "", [f"subjects.that dog.words={'a ' * 150}"], "that dog: TMP/protocol.yaml: 'a photo of an a a"),
    ],
)
def test_texts_that_cannot_be_read_are_named_before_any_task(file, text, words, message, experiment, tmp_path):
    config = experiment()
    if file is not None:
        path = tmp_path / file
        kept = path.read_text().splitlines() if path.exists() else []
        path.write_text("\n".join([*(line for line in kept if not line.startswith(text[:5])), text]))
    with pytest.raises(UserError) as error:
        read_experiment(str(config), words, tmp_path)
    assert message.replace("TMP", str(tmp_path)) in str(error.value)


def test_what_is_lost_of_captions_is_told_once_by_file_and_line(experiment, tmp_path, capsys):
    """Once for both methods, whose words for the concept differ, where it is the same."""
    config = experiment()
    (tmp_path / "cats/0.txt").write_text("a cat\n\n\na cat " + "red " * 12 + "on grass")
    (tmp_path / "dogs/2.txt").write_text("\non grass\n")
    read_experiment(str(config), [], tmp_path / "protocols")
    lost = f"1 captions have more than the 14 tokens that training reads; lost: {tmp_path}/cats/0.txt:4:"
    unnamed = f"1 captions name no 'dog' and get `{{}}, ` before them: {tmp_path}/dogs/2.txt:2: 'on grass'"
    expected = [f"{lost} 'on grass'", unnamed, f"{lost} 'red on grass'"]
    assert capsys.readouterr().err.splitlines() == [f"warning: {line}" for line in expected]


def test_only_keeps_what_is_named(experiment, tmp_path):
    whole = read_experiment(str(experiment()), [], tmp_path)
    runs = whole.only(["infusion", "that dog"]).runs()
    assert [(variant.name, subject.name, seed) for variant, subject, seed in runs] == [("infusion", "that dog", 0)]
    assert len(whole.only(["infusion"]).runs()) == 2 and len(whole.runs()) == 4


def test_seeds_of_its_own_and_rows_without(experiment, tmp_path):
    file = tmp_path / "mine.safetensors"
    file.touch()
    words = ["variants.infusion.seeds=[5,6]", f"variants.mine.file={file}", "seeds=[1]"]
    runs = read_experiment(str(experiment()), words, tmp_path).runs()
    assert [seed for variant, subject, seed in runs if subject.name == "this cat"] == [5, 6, 1, None]


def test_trials_are_variants_of_each_combination_and_the_base_comes_last(experiment, tmp_path):
    words = ["variants.infusion.trials={learning_rate: [0.1, 0.3], batch_size: [1, 2]}", "base=last.yaml"]
    with pytest.raises(UserError, match=r"variants.infusion 0.1 1: last.yaml: no such config file"):
        read_experiment(str(experiment()), words, tmp_path)
    found = read_experiment(str(experiment()), words[:1], tmp_path).variants
    assert [one.name for one in found] == [*(f"infusion {a} {b}" for a in (0.1, 0.3) for b in (1, 2)), "dreambooth"]
    assert found[1].overrides == ["learning_rate=0.1", "batch_size=2"] and found[1].config == found[0].config


@pytest.mark.parametrize("name", ["pocket", "pocket_ablations"])
def test_every_training_of_the_pocket_comparison_can_be_built(name, tmp_path):
    experiment = read_experiment(f"configs/experiment/{name}.yaml", [], tmp_path)
    assert experiment.variants[0].name == "infusion"  # from which reports say how the others differ
    assert "green_dotted_elephant" not in [subject.name for subject in experiment.subjects]  # chose the recipes
    for variant in experiment.variants:
        config = read_config(training.parse(arguments(variant, experiment.subjects[2], 5, "photos")))
        nodes = OmegaConf.to_container(config)
        check(nodes["data"], "data")
        method = instantiate(config.model.params.method, "method")
        assert method.name == ("infusion" if name == "pocket_ablations" else variant.name)
        assert config.model.params.seed == config.data.params.seed == 5
        assert config.data.params.batch_size == 8  # the budget of docs/comparison.md
        assert 150 <= config.trainer.max_steps <= (1200 if variant.name == "textual_inversion" else 400)


def test_every_method_and_regulariser_is_a_row_of_the_comparison(monkeypatch, tmp_path):
    monkeypatch.setattr("scripts.experiments.config.check", lambda _: None)  # the weights are not here
    rows = []
    for name in ("pocket_two", "pocket_two_regularisers"):
        experiment = read_experiment(f"configs/experiment/{name}.yaml", [], tmp_path)
        assert experiment.variants[0].name == "infusion"
        rows += [(variant, experiment.subjects[0]) for variant in experiment.variants]
    methods, terms = set(), set()
    for variant, subject in rows:
        model = read_config(training.parse(arguments(variant, subject, 5, "photos"))).model.params
        methods.add(instantiate(model.method, "method").name)
        terms |= {type(instantiate(node, name)) for name, node in (model.get("regularisers") or {}).items()}
    assert methods == set(method_names())
    files = [path.stem for path in (ROOT / "infusion/regularisers").glob("*.py")]
    assert {term.__module__.rpartition(".")[2] for term in terms} == {
        name for name in files if (ROOT / f"configs/with/{name}.yaml").exists()
    }


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_what_is_shipped_lacks_nothing_but_weights_and_photos(path, tmp_path):
    if path.stem not in ABSENT:
        assert read_experiment(str(path), [], tmp_path).runs()
        return
    with pytest.raises(UserError, match=r"there is no (file|folder|photo in) (ckpt|photos)/"):
        read_experiment(str(path), [], tmp_path)
