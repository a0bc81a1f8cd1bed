import json
from contextlib import contextmanager

import pytest
import torch

from infusion.attention import EditedCrossAttention
from infusion.sampling.customised import Customised
from infusion.sampling.sample import sample
from ldm.pipeline import StableDiffusion
from scripts.benchmark import main
from scripts.benchmarks import battery, measure
from scripts.benchmarks.cases import CASES, RATIOS, Settings, build_model, noise, random_concepts

SETTINGS = Settings("cpu", "pocket", latent=8, batch=2, steps=2)


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


@pytest.mark.parametrize("name", ["train_step", "train_step_checkpointing"])
def test_a_training_step_learns(pocket, name):
    with CASES[name](pocket, SETTINGS) as run:
        first, second = run(), run()
    assert 0 < second < first  # the same timesteps and noise, after one step of learning
    assert all(parameter.grad is None for parameter in pocket.parameters()) and not pocket.unet.checkpoint


def test_cases_take_turns_and_only_their_runs_are_timed(pocket, monkeypatch):
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

    monkeypatch.setattr(measure, "CASES", {"a": case("a", 5), "b": case("b", 7)})
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    assert measure.take_turns(["a", "b"] * 2, pocket, SETTINGS) == {"a": [5, 5], "b": [7, 7]}
    assert order == ["a", "b", "a", "b"]


def test_a_file_and_a_table(tmp_path, capsys):
    file = tmp_path / "new/result.json"
    name = "guided_step_with_concept_vs_base"
    flags = ["--size", "pocket", "--latent", "8", "--device", "cpu", "--repeats", "3", "--only", f"{name},unet"]
    main([*flags, "--json", str(file)])
    found, shown = json.loads(file.read_text()), capsys.readouterr().out
    base, concept = RATIOS[name][::-1]
    cases, ratio = found["cases"], found["ratios"][name]
    assert list(cases) == [base, concept, "unet"]
    assert all(0 < case["q1"] <= case["median"] <= case["q3"] for case in (*cases.values(), ratio))
    assert cases["unet"]["flops"] * 2 == cases[base]["flops"]  # guidance has two rows for each image
    assert found["command"].startswith("python scripts/benchmark.py --size pocket --latent 8")
    assert found["device"]["torch"] == torch.__version__ and found["device"]["name"]
    assert {base, concept, "unet", name} <= {line.split()[0] for line in shown.splitlines() if line}


def test_operations_are_known_from_shapes_alone(tmp_path, pocket):
    """As many as are counted where they are done; training holds more than a guided step does."""
    file, wanted = tmp_path / "shapes.json", "guided_step_with_concept_vs_base,train_step,train_step_checkpointing"
    flags = ["--size", "pocket", "--latent", "8", "--batch", "2", "--only", wanted]
    main([*flags, "--estimate", "--json", str(file)])
    found = json.loads(file.read_text())
    assert 1.3 < found["ratios"]["guided_step_with_concept_vs_base"]["flops"] < 1.6  # a third row of its two
    for name, case in found["cases"].items():
        assert case["flops"] == pytest.approx(measure.warm_up(name, pocket, SETTINGS)["flops"], rel=0.02)
    weights = sum(parameter.nbytes for parameter in pocket.parameters())
    step, training = (found["cases"][name] for name in ("guided_step_one_concept", "train_step"))
    assert step["weights_bytes"] == pytest.approx(weights, rel=0.01)
    assert step["weights_bytes"] < step["peak_bytes"] < training["peak_bytes"]


@pytest.mark.slow
def test_the_battery_is_rehearsed_without_a_gpu(tmp_path, capsys):
    file = tmp_path / "gpu.json"
    main(["--rehearse", "--device", "cpu", "--json", str(file)])
    found, shown = json.loads(file.read_text()), capsys.readouterr().out
    assert list(found["sizes"]) == ["pocket", "pocket_xl"] and found["command"].endswith(str(file))
    for name, size in found["sizes"].items():
        assert set(battery.PARTS) <= set(size)
        step = "train_step" if name == "pocket" else "train_step_checkpointing"  # as its recipe
        assert size["concept_photos"] == 8000
        assert size["concept_s"] == pytest.approx(8000 * size[step][step]["median"] / battery.PHOTOS)
        assert size["utilisation"]["unet"] > 0 and size["fp16_scaler"]["finite"] and size["cuda_graph"] == "needs CUDA"
        assert size["compiled"]["plain"] > 0 and size["compiled"]["compiled"] > 0
    shown = {line.split()[0] for line in shown.splitlines() if line}
    assert {"concept_s", "utilisation.unet", "image.image.median"} <= shown


def test_the_battery_needs_a_gpu(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--battery", "--device", "cpu"])
    assert stopped.value.code == 2 and "--battery: needs CUDA, not cpu" in capsys.readouterr().err


def test_a_part_that_fails_leaves_the_others(monkeypatch):
    def fail(sd, settings):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(battery, "SIZES", battery.SMALL)
    parts = {name: (0, fail) for name in battery.PARTS}
    parts |= {"fp16_scaler": (0, lambda sd, settings: 3), "image": (10**6, fail)}
    monkeypatch.setattr(battery, "PARTS", parts)
    found = battery.battery(torch.device("cpu"), rehearse=False, save=lambda sizes: None)
    assert found["pocket"]["train_step"] == "failed: no memory" and found["pocket_xl"]["fp16_scaler"] == 3
    assert found["pocket"]["image"] == "left out: no time"
