import json
from contextlib import contextmanager

import pytest
import torch

from infusion.attention import EditedCrossAttention
from infusion.sampling.customised import Customised
from infusion.sampling.sample import sample
from ldm.pipeline import StableDiffusion
from scripts import benchmark
from scripts.benchmark import CASES, RATIOS, Settings, build_model, main, noise, random_concepts

SETTINGS, MIB = Settings("cpu", "pocket", latent=8, batch=2, steps=2), 2**20


@pytest.fixture(scope="module")
def pocket() -> StableDiffusion:
    return build_model(SETTINGS)


def result(name: str, sd: StableDiffusion) -> torch.Tensor:
    """What a case gives; it leaves the base model as it was."""
    with CASES[name](sd, SETTINGS) as run:
        found = run()
    assert not any(isinstance(module, EditedCrossAttention) for module in sd.unet.modules())
    return found


def test_a_model_is_frozen_and_nothing_in_it_is_zero(pocket):
    assert all(parameter.any() and not parameter.requires_grad for parameter in pocket.parameters())


def test_guided_steps_are_the_samplers(pocket):
    base, latents = result("guided_step_base", pocket), noise(pocket, SETTINGS)
    with torch.no_grad():
        expected = pocket.guided(["a photo of a cat"] * 2, scale=7.5)(latents, torch.tensor(500))
    torch.testing.assert_close(base, expected)
    eight = "a photo of a " + ", a ".join(f"{{{i}}}" for i in range(1, 9))
    for name, number, prompt in (("one_concept", 1, "a photo of a {1}"), ("eight_concepts", 8, eight)):
        with Customised(pocket, random_concepts(pocket, number)) as customised, torch.no_grad():
            expected = customised([prompt] * 2)(latents, torch.tensor(500))
        assert torch.equal(result(f"guided_step_{name}", pocket), expected)
        assert (expected - base).norm() > 1e-3 * expected.norm()


def test_an_image_is_what_the_sampler_draws(pocket):
    concepts = random_concepts(pocket, 1)
    expected = sample(pocket, ["a photo of a {}"] * 2, concepts, steps=2, height=32, width=32)
    assert torch.equal(result("image", pocket), expected) and expected.shape == (2, 3, 32, 32)


def test_the_unet_is_diffusers(pocket):
    ours, theirs = result("unet", pocket), result("unet_diffusers", pocket)
    assert theirs.std() > 1e-3  # nothing agrees by being zero
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    pocket.unet.out[2].bias.add_(0.1)
    assert not torch.equal(result("unet", pocket), ours)
    pocket.unet.out[2].bias.sub_(0.1)


def test_other_predictions_than_diffusers_are_an_error(pocket, monkeypatch):
    @contextmanager
    def case(sd, settings, diffusers=False):
        yield lambda: torch.full((2,), 1.0 if diffusers else 1.1)

    monkeypatch.setattr(benchmark, "unet", case)
    with pytest.raises(RuntimeError, match=r"unet and unet_diffusers differ by 1.0e-01"):
        benchmark.check_agreement(pocket, SETTINGS)


@pytest.mark.parametrize("name", ["train_step", "train_step_checkpointing"])
def test_a_training_step_learns(pocket, name):
    with CASES[name](pocket, SETTINGS) as run:
        first, second = run(), run()
    assert 0 < second < first  # the same timesteps and noise, after one step of learning
    assert all(parameter.grad is None for parameter in pocket.parameters()) and not pocket.unet.checkpoint


def test_cases_take_turns_and_only_their_runs_are_timed(monkeypatch):
    now, order = [0.0], []

    def case(name, seconds):
        @contextmanager
        def ready(sd, settings):
            now[0] += 3600

            def run():
                order.append(name)
                now[0] += seconds

            yield run

        return ready

    monkeypatch.setattr(benchmark, "CASES", {"a": case("a", 5), "b": case("b", 7)})
    assert benchmark.take_turns(["a", "b"] * 2, None, SETTINGS, lambda: now[0]) == {"a": [5, 5], "b": [7, 7]}
    assert order == ["a", "b", "a", "b"]


def test_a_peak_is_what_the_case_takes_at_most_after_the_model_was_built(pocket, monkeypatch):
    """The model takes 300 MiB while it is built; the case takes 100 for a moment, and keeps none."""

    @contextmanager
    def case(sd, settings):
        yield lambda: torch.ones(100 * MIB // 4)

    def build(settings):
        torch.ones(300 * MIB // 4)
        return pocket

    monkeypatch.setattr(benchmark, "build_model", build)
    monkeypatch.setitem(CASES, "image", case)
    found = benchmark.peak_here("image", SETTINGS)
    assert 90 * MIB < found["above_loaded_bytes"] < 130 * MIB
    assert found["peak_bytes"] == found["loaded_bytes"] + found["above_loaded_bytes"]


def test_a_file_and_a_table(tmp_path, capsys):
    file = tmp_path / "new/result.json"
    name = "guided_step_with_concept_vs_base"
    flags = ["--size", "pocket", "--latent", "8", "--device", "cpu", "--repeats", "3", "--only", f"{name},unet"]
    main([*flags, "--json", str(file)])
    found, shown = json.loads(file.read_text()), capsys.readouterr().out
    base, concept = RATIOS[name][::-1]
    assert list(found["times"]) == list(found["flops"]) == [base, concept, "unet"] and found["memory"] == {}
    assert all(
        0 < t["min_s"] <= t["q1_s"] <= t["median_s"] <= t["q3_s"] and t["n"] == 3 for t in found["times"].values()
    )
    assert found["flops"]["unet"] * 2 == found["flops"][base]  # guidance has two rows for each image
    ratio = found["ratios"][name]
    assert ratio["value"] == found["times"][concept]["median_s"] / found["times"][base]["median_s"]
    assert 1.3 < ratio["flops"] < 1.6  # three rows instead of two, of which one has no cross-attention of its own
    assert found["command"].startswith("python scripts/benchmark.py --size pocket --latent 8")
    assert found["device"]["torch"] == torch.__version__ and found["device"]["name"]
    assert {base, concept, "unet", name} <= {line.split()[0] for line in shown.splitlines() if line}


def test_operations_are_known_from_shapes_alone(tmp_path, pocket):
    """As many as are counted where they are done; training holds more than a guided step does."""
    file, names = tmp_path / "shapes.json", "guided_step_one_concept,train_step,train_step_checkpointing"
    flags = ["--size", "pocket", "--latent", "8", "--batch", "2", "--device", "cpu", "--only", names]
    main([*flags, "--estimate", "--json", str(file)])
    found = json.loads(file.read_text())
    assert found["times"] == {} and list(found["flops"]) == names.split(",")
    for name, flops in found["flops"].items():
        assert flops == pytest.approx(benchmark.count_flops(name, pocket, SETTINGS), rel=0.02)
    above = {name: memory["above_loaded_bytes"] for name, memory in found["memory"].items()}
    assert 0 < above["guided_step_one_concept"] < above["train_step"]
    weights = sum(parameter.nbytes for parameter in pocket.parameters())
    assert found["memory"]["train_step"]["loaded_bytes"] == pytest.approx(weights, rel=0.01)


@pytest.mark.slow
def test_the_battery_is_rehearsed_without_a_gpu(tmp_path, capsys):
    file = tmp_path / "gpu.json"
    main(["--rehearse", "--device", "cpu", "--json", str(file)])
    found, shown = json.loads(file.read_text()), capsys.readouterr().out
    assert list(found["sizes"]) == ["pocket", "pocket_xl"] and found["command"].endswith(str(file))
    for size in found["sizes"].values():
        measured = size["measured"]
        step = "train_step" if size["settings"]["size"] == "pocket" else "train_step_checkpointing"  # as its recipe
        assert list(measured["seconds"]) == [*benchmark.TIMED] and all(measured["seconds"].values())
        assert size["concept_photos"] == 8000 and size["utilisation"]["unet"] > 0
        assert size["concept_s"] == pytest.approx(8000 * measured["seconds"][step] / benchmark.PHOTOS)
        assert size["fp16_scaler"]["finite"] and size["cuda_graph"] == "needs CUDA"
        assert size["compiled"]["plain_s"] > 0 and size["compiled"]["compiled_s"] > 0
    assert {"concept_s", "utilisation.unet", "measured.seconds.image"} <= {
        line.split()[0] for line in shown.splitlines() if line
    }


@pytest.mark.parametrize(("flags", "message"), [
    (["--battery"], "--battery: name the file"), (["--battery", "--json", "x.json"], "--battery: needs CUDA, not cpu"),
])  # fmt: skip
def test_the_battery_needs_a_file_and_a_gpu(flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main([*flags, "--device", "cpu"])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
