import json

import pytest
import torch

from scripts import benchmark
from scripts.benchmark import main
from scripts.benchmarks import measure

SMALL = ["--size", "pocket", "--latent", "8", "--device", "cpu"]


@pytest.fixture
def refused(capsys):
    """The one line that the command ends with, with exit code 2."""

    def of(*arguments: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(list(map(str, arguments)))
        assert stop.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        return line

    return of


def test_a_file_and_a_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(measure.PEAK_SIDE, "cpu", 128)
    file = tmp_path / "new" / "result.json"
    main([*SMALL, "--repeats", "2", "--only", "train_step_with_checkpointing_vs_without", "--json", str(file)])
    result, shown = json.loads(file.read_text()), capsys.readouterr()
    assert {"date", "device", "settings", "command", "peak", "times", "flops", "utilisation"} <= result.keys()
    assert {"memory", "ratios", "agreement"} <= result.keys()
    assert {"name", "cores", "threads", "torch", "dtype"} <= result["device"].keys()
    assert result["command"].startswith("python scripts/benchmark.py --size pocket --latent 8 --device cpu --repeats 2")
    assert result["settings"]["repeats"] == 2 and result["settings"]["batch"] == 1
    assert list(result["times"]) == ["train_step", "train_step_checkpointing"]
    assert all(time["n"] == 2 for time in result["times"].values())
    (ratio,) = result["ratios"].values()
    stored, recomputed = (result["times"][name]["median_s"] for name in result["times"])
    assert ratio["value"] == pytest.approx(recomputed / stored) and ratio["flops"] > 1
    assert "train_step_with_checkpointing_vs_without" in shown.out and "train_step_checkpointing" in shown.err


def test_defaults_depend_on_the_device(monkeypatch: pytest.MonkeyPatch):
    flags = benchmark.parse([])
    assert (flags.size, flags.batch, flags.precision) == ("sd15", 1, "full")
    monkeypatch.setattr(benchmark, "find_device", lambda name: torch.device("cpu"))
    settings = benchmark.settle(flags)
    assert (settings.device, settings.latent, settings.repeats) == ("cpu", 32, 5)
    monkeypatch.setattr(benchmark, "find_device", lambda name: torch.device("cuda:1"))
    settings = benchmark.settle(flags)
    assert (settings.device, settings.latent, settings.repeats) == ("cuda:1", 64, 20)


def test_what_it_refuses(refused, tmp_path):
    assert "--only: there is no case `guided`" in refused(*SMALL, "--only", "unet,guided")
    assert "--device" in refused("--size", "pocket", "--device", "nowhere")
    assert "--device: times are taken on cpu and cuda, not on meta" in refused("--size", "pocket", "--device", "meta")
    assert "--latent: must be a multiple of 4 for pocket, not 10" in refused(*SMALL, "--latent", "10")
    assert "--latent" in refused(*SMALL, "--latent", "0")
    assert "--repeats" in refused(*SMALL, "--repeats", "-1")
    assert "--size" in refused("--size", "sd3")


def test_nothing_is_overwritten(refused, tmp_path):
    file = tmp_path / "result.json"
    file.write_text("mine")
    assert f"--json: {file} is there already" in refused(*SMALL, "--json", file)
    assert "--json" in refused(*SMALL, "--json", file / "result.json")
    assert file.read_text() == "mine"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_a_device_that_is_not_there(refused):
    assert "--device: cuda cannot be used here" in refused("--size", "pocket", "--device", "cuda")
