"""Whole experiments: the commands themselves, on Ray."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from ldm.util.config import ROOT
from ldm.util.files import PARTIAL
from scripts.experiment import main
from tests.scripts.experiments.conftest import NODE

ONLY = ["--only", "infusion,this cat"]
QUICK = {"SOURCE_DATE_EPOCH": "1700000000", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def cluster(monkeypatch):
    """Two machines of one core each, beside one that only leads."""
    for name, value in QUICK.items():
        monkeypatch.setenv(name, value)
    machines = Cluster(initialize_head=True, head_node_args=NODE | {"num_cpus": 0})
    for _ in range(2):
        machines.add_node(**{key: value for key, value in NODE.items() if key != "include_dashboard"})
    ray.init(address=machines.address, log_to_driver=False, logging_level="ERROR")
    yield machines
    ray.shutdown()
    machines.shutdown()


def command_of(out: Path, script: str) -> psutil.Process | None:
    """The process of a task of `out` that Ray has started."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if any(word.endswith(script) for word in words[:2]) and str(out) in " ".join(words):
            return process if machine_of(process) else None
    return None


def machine_of(process: psutil.Process) -> psutil.Process | None:
    """The raylet above it."""
    return next((one for one in process.parents() if one.name() == "raylet"), None)


def found(what: Callable[[], object], seconds: float = 300.0) -> object:
    """What `what` gives once it gives something."""
    end = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return value


def lose(process: psutil.Process) -> None:
    """Kills a process and all below it, as where a machine loses its power."""
    for one in [process, *process.children(recursive=True)]:
        if one.is_running():
            one.kill()


def files(out: Path) -> dict[str, bytes]:
    """Concepts and measured rows, by relative path; what a killed process had not finished is none of these."""
    paths = (path for path in sorted(out.rglob("*.safetensors")) if not path.parent.name.endswith(PARTIAL))
    return {str(path.relative_to(out)): path.read_bytes() for path in paths}


def figures(out: Path) -> dict:
    (file,) = out.glob("report/*/report/metrics.json")
    return {name: row["figures"] for name, row in json.loads(file.read_text())["methods"].items()}


@pytest.mark.slow
def test_what_loses_its_driver_a_machine_and_a_worker_ends_as_what_does_not(cluster, experiment, tmp_path, capsys):
    config, whole, halted = str(experiment(steps=400)), tmp_path / "whole", tmp_path / "halted"
    main([config, "--out", str(whole), *ONLY])
    words = [sys.executable, str(ROOT / "scripts/experiment.py"), config, "--out", str(halted), *ONLY]
    environment = os.environ | {"RAY_ADDRESS": ""}
    driver = subprocess.Popen([*words, "--cores", "1"], env=environment, start_new_session=True)
    state = found(lambda: next(halted.glob("train/*/run/models/last.ckpt"), None))
    lose(psutil.Process(driver.pid))
    driver.wait()
    assert not list(halted.glob("train/*/done"))
    seen = []

    def disturb() -> None:
        before = state.stat().st_mtime_ns
        training = found(lambda: state.stat().st_mtime_ns > before and command_of(halted, "main.py"))
        seen.append(("machine", not list(halted.glob("train/*/done"))))
        lose(machine_of(training))
        measuring = found(lambda: list(halted.glob("cache/*")) and command_of(halted, "metrics.py"))
        seen.append(("worker", not list(halted.glob("measure/*/done"))))
        measuring.parent().kill()

    disturber = Thread(target=disturb)
    disturber.start()
    main([config, "--out", str(halted), *ONLY])
    disturber.join()
    assert seen == [("machine", True), ("worker", True)]
    assert "4 of 4 done, 0 failed" in capsys.readouterr().err
    assert files(halted) == files(whole) and len(files(whole)) > 4 and figures(halted) == figures(whole)
    log = next(halted.glob("train/*/log.txt")).read_text()
    assert log.count("trainable parameters") >= 2  # it was resumed …
    marks = {path: path.stat().st_mtime_ns for path in halted.rglob("done")}
    main([config, "--out", str(halted), *ONLY])
    assert marks == {path: path.stat().st_mtime_ns for path in halted.rglob("done")}  # … and is not repeated


@pytest.mark.slow
def test_a_plan_says_what_is_then_done(local, experiment, tmp_path, capsys):
    """How near its hours are is no matter for a test: other work on the machine changes them."""
    config, out = str(experiment(steps=3)), tmp_path / "out"
    main([config, "--out", str(out), "--plan", *ONLY])
    said = capsys.readouterr().out
    assert "train              1     1" in said and "measure            1     1" in said and "core hours" in said
    assert float(said.splitlines()[-1].split("about ")[1].split()[0]) > 0
    main([config, "--out", str(out), *ONLY])
    assert len(list(out.glob("train/*/done"))) == len(list(out.glob("measure/*/done"))) == 1


@pytest.mark.slow
def test_a_variant_that_fails_leaves_the_rest_complete(local, experiment, tiny, tmp_path, capsys):
    config, out = str(experiment(steps=3)), tmp_path / "out"
    broken = f"{{config: [{tiny}, configs/method/lora.yaml, {tmp_path}/recipe.yaml], overrides: [batch_size=5000]}}"
    words = ["--out", str(out), f"variants.broken={broken}"]
    with pytest.raises(SystemExit) as stop:
        main([config, *words])
    said = capsys.readouterr()
    assert stop.value.code == 1, said.err
    assert "failed: train: broken this cat 0: exit status 2: error: " in said.err
    assert "not started: train: broken that dog 0 failed" in said.err and "--retry-failed" in said.err
    assert set(figures(out)) == {f"{v} · {s} · 0" for v in ("infusion", "dreambooth") for s in ("this cat", "that dog")}
    assert f"open {next(out.glob('report/*/report/report.html'))}" in said.out
