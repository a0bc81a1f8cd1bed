import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data.pocket.concepts import CONCEPTS
from infusion.methods import method_names
from ldm.util.cli import UserError
from ldm.util.config import check, find, instantiate, load_config, resolve
from ldm.util.files import locked
from scripts.pocket import compare
from scripts.pocket.compare import ABLATIONS, COMPARED, TUNED_ON, Run, main, mask, measure


@pytest.fixture
def calls(monkeypatch):
    """What would be run; every command succeeds."""
    seen = []

    def run(command, **options):
        seen.append(command[1:])
        if "--logdir" in command:
            Path(command[command.index("--logdir") + 1]).mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    return seen


def test_the_recipes_were_chosen_on_another_concept():
    assert TUNED_ON in CONCEPTS and TUNED_ON not in COMPARED and len(COMPARED) >= 5
    assert {CONCEPTS[name].level for name in COMPARED} == {1, 2, 3}


@pytest.mark.parametrize("variant", [*method_names(), *ABLATIONS])
def test_every_run_is_a_config_that_can_be_built(variant, tmp_path):
    command = Run(variant, "zigzag_hat", 5).start(tmp_path)
    overrides = [word for word in command if "=" in word and not word.startswith("--")]
    config = resolve(
        load_config([find(f"configs/compare/{'infusion' if variant in ABLATIONS else variant}.yaml")], overrides)
    )
    check(config.model, "model")
    check(config.data, "data")
    method = instantiate(config.model.params.method, "method")
    assert method.name == ("infusion" if variant in ABLATIONS else variant)
    assert config.model.params.seed == config.data.params.seed == 5
    assert config.data.params.batch_size == 8  # the budget of docs/comparison.md
    assert 150 <= config.trainer.max_steps <= (1200 if variant == "textual_inversion" else 400)


def test_a_killed_comparison_goes_on(calls, tmp_path):
    run = Run("lora", "zigzag_hat", 1)
    run.train(tmp_path)
    assert "--logdir" in calls[-1] and "--resume" not in calls[-1]
    (run.folder(tmp_path) / "done").unlink()
    (run.folder(tmp_path) / "config.yaml").touch()
    run.train(tmp_path)  # killed after it began: on
    assert calls[-1][1:4] == ["--resume", str(run.folder(tmp_path)), "-t"]
    run.train(tmp_path)  # done
    assert len(calls) == 2


def test_a_training_that_a_killed_comparison_left_behind_is_waited_for(calls, tmp_path):
    run, order = Run("lora", "zigzag_hat", 1), []
    with ThreadPoolExecutor(1) as pool:
        with locked(run.folder(tmp_path)):
            second = pool.submit(lambda: (run.train(tmp_path), order.append("second")))
            time.sleep(0.3)
            order.append("first")
        second.result()
    assert order == ["first", "second"] and len(calls) == 1


def test_a_training_that_fails_is_named(monkeypatch, tmp_path):
    failed = SimpleNamespace(returncode=2, stderr="warning: x\nerror: batch_size: must be at least 1, not 0\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UserError, match="lora, zigzag hat, 1: .*main.py.* failed: error: batch_size"):
        Run("lora", "zigzag_hat", 1).train(tmp_path)
    assert not (Run("lora", "zigzag_hat", 1).folder(tmp_path) / "done").exists()


def test_a_failure_ends_the_comparison(monkeypatch, capsys, tmp_path):
    begun = []

    def fail(self, work):
        begun.append(self)
        time.sleep(0.05)
        raise UserError("lora, zigzag hat, 0: failed")

    monkeypatch.setattr(compare, "mask", lambda concepts, work: None)
    monkeypatch.setattr(Run, "train", fail)
    words = ["--methods", "lora", "--ablations", "none", "--concepts", "zigzag_hat", "--seeds", "0,1,2,3,4,5,6,7"]
    with pytest.raises(SystemExit) as stop:
        main([*words, "--work", str(tmp_path), "--jobs", "1"])
    assert stop.value.code == 2 and "error: lora, zigzag hat, 0: failed" in capsys.readouterr().err
    assert len(begun) < 8


def test_infusion_is_what_the_other_methods_are_held_against():
    assert compare.methods()[0] == "infusion" and sorted(compare.methods()) == method_names()


def test_photos_are_masked_once(monkeypatch, tmp_path):
    loads = []

    class Left:
        def squeeze(self, images):
            return images

        def masks(self, images, prompts):
            return (torch.arange(64) < 32).float().expand(len(images), 64, 64)

    monkeypatch.setattr(compare, "load", lambda name: loads.append(name) or Left())
    mask(["zigzag_hat"], tmp_path)
    folder = tmp_path / "photos/zigzag_hat"
    assert len(list(folder.glob("*.png"))) == len(list((folder / "mask").glob("*.png"))) == 5
    mask(["zigzag_hat"], tmp_path)
    assert loads == ["pocket"]


@pytest.mark.parametrize("given", ["out", None])
def test_a_report_of_the_methods_and_one_of_the_ablations(given, calls, monkeypatch, tmp_path):
    monkeypatch.setattr(compare, "mask", lambda concepts, work: None)
    words = [
        "--methods",
        "infusion,custom_diffusion",
        "--ablations",
        "hard gate",
        "--concepts",
        "zigzag_hat",
        "--seeds",
        "0,1",
    ]
    out = tmp_path / (given or "work/report")
    words += ["--out", str(out)] if given else []
    main([*words, "--work", str(tmp_path / "work"), "--jobs", "1", "--devices", "3"])
    assert len(calls) == 2 * 2 + 1 + 2
    methods, ablations = (dict(zip(call[1::2], call[2::2], strict=True)) for call in calls[-2:])
    assert methods["--out"] == str(out) and ablations["--out"] == str(out / "ablations")
    assert methods["--labels"].split(",") == [
        f"{variant} · zigzag hat · {seed}" for variant in ("infusion", "custom diffusion") for seed in (0, 1)
    ]
    assert methods["--groups"] == "infusion,infusion,custom diffusion,custom diffusion"
    assert ablations["--labels"] == "infusion · zigzag hat · 0,hard gate · zigzag hat · 0"
    assert ablations["--personalized_ckpt"].endswith("runs/hard-gate/zigzag_hat/seed-0")
    assert methods["--cache"] == ablations["--cache"] and methods["--devices"] == ablations["--devices"] == "3"


def test_measuring_that_fails_ends_the_comparison(monkeypatch, tmp_path):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=2))
    with pytest.raises(SystemExit) as stop:
        measure([Run("lora", "zigzag_hat", 0)], tmp_path, tmp_path / "out", 4)
    assert stop.value.code == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "lara"], "--methods: there is no `lara`; did you mean `lora`?"),
        (["--concepts", "zigzag_hut"], "did you mean `zigzag_hat`?"),
        (["--seeds", "one"], "--seeds: whole numbers are wanted, not `one`"),
    ],
)
def test_mistakes_are_one_line(words, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main([*words, "--work", str(tmp_path / "work")])
    assert stop.value.code == 2 and message in capsys.readouterr().err and not (tmp_path / "work").exists()
