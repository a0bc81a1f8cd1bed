import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from infusion.metrics.measures import fidelity
from infusion.metrics.measures.fidelity import drift, pairwise
from infusion.metrics.run import stages
from infusion.metrics.run.cache import Cache
from infusion.metrics.run.evaluate import check, evaluate
from infusion.metrics.run.options import EVALUATION_SEED, METRICS, Tools
from infusion.metrics.run.protocol import CONTEXT, GROUPS
from infusion.metrics.run.subject import Subject
from infusion.sampling.sample import sample
from ldm.util.config import ROOT
from tests.infusion.metrics.conftest import ROUNDING

PHOTOS = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
ALL = tuple(name for name in METRICS if name not in ("dino", "dinov2", "identity", "exact"))


class Exactly:
    name, described = "the cat", "a striped cat"

    def measure(self, templates, superclass, ours, base):
        assert superclass == "cat" and len(templates) == len(ours) == len(base)
        return {"leakage": {"value": (ours - base).abs().mean().item(), "stderr": None, "n": len(ours)}}


@pytest.fixture
def every(options):
    return replace(options, metrics=(*ALL, "exact"))


@pytest.fixture
def known(subject):
    """A subject with photos and exact measures."""

    def make(name, **arguments):
        return replace(subject(name, **arguments).with_photos(PHOTOS, "folder"), exact=Exactly())

    return make


def plain(result):
    return {key: value for key, value in result.items() if key != "pictures"}


def values(result):
    return {name: figure["value"] for name, figure in result["figures"].items()}


def test_a_concept_that_learned_nothing_is_the_base_model(sd, protocol, every, tools, known, cache):
    result = evaluate(sd, known("infusion", steps=0), protocol, every, cache, tools)
    found = values(result)
    assert set(found) == {*(f"lfd_{name}" for name in GROUPS), "w2_latent", "w2_latent_exact", "w2_clip",
                          "w2_clip_exact", "kid", "clip_t", "clip_i", "noun", "pres", "div", "drift",
                          "leakage"}  # fmt: skip
    for name in GROUPS:
        assert found[f"lfd_{name}"] == pytest.approx(0, abs=ROUNDING if name == CONTEXT else 0), name
    assert result["figures"]["drift"]["value"] == pytest.approx(0, abs=1e-12)
    for name in ("leakage", "kid", "w2_latent", "w2_clip", "w2_latent_exact", "w2_clip_exact", "drift"):
        assert found[name] == pytest.approx(0, abs=1e-4), name
    for name in ("clip_t", "clip_i", "noun", "pres", "div"):
        assert found[name] == pytest.approx(result["figures"][name]["base"]["value"], abs=1e-6)
        assert found[name] != 0 or name == "noun"
    assert all(result["figures"][f"w2_{name}"]["floor"]["value"] > 0.01 for name in ("latent", "clip"))


def test_figures_are_those_of_the_definitions(sd, protocol, every, tools, known, cache):
    learned = known("lora", learning_rate=0.05)
    result = evaluate(sd, learned, protocol, every, cache, tools)
    templates = protocol.prompts(CONTEXT, "cat") * 2
    drawing = {"steps": 2, "scale": 2.0, "seed": EVALUATION_SEED}
    ours = sample(sd, templates, [learned.concept], **drawing)
    base = sd.sample([template.replace("{}", "cat") for template in templates], **drawing)
    clip, figures = tools.clip, result["figures"]
    like = pairwise(clip(ours), clip(PHOTOS))
    assert figures["clip_i"]["value"] == pytest.approx(like.mean().item(), abs=1e-4)
    assert figures["clip_i"]["stderr"] == pytest.approx(like.std().item() / 2, abs=1e-4)
    assert figures["clip_i"]["base"]["value"] == pytest.approx(
        pairwise(clip(base), clip(PHOTOS)).mean().item(), abs=1e-4
    )
    assert figures["leakage"]["value"] == pytest.approx((ours - base).abs().mean().item(), abs=1e-4)
    moved = []
    for group in ("none", "superclass", "neighbours"):  # two of each: 4 samples over 3 groups
        prompts = protocol.prompts(group, "cat")[:2]
        base, ours = sd.sample(prompts, **drawing), sample(sd, prompts, [learned.concept], **drawing)
        moved.append(drift(clip(base), clip(ours)))
    moved = torch.cat(moved)
    assert figures["drift"]["n"] == 6 and figures["drift"]["value"] == pytest.approx(moved.mean().item(), abs=1e-5)
    assert figures["drift"]["value"] > 0 and figures["lfd_none"]["value"] > 0
    assert figures["div"]["n"] == 2  # prompts, two samples each
    assert figures["w2_clip"]["low"] < figures["w2_clip"]["high"] and figures["w2_clip"]["stderr"] > 0
    settings = figures["lfd_context"]["settings"]
    assert settings["strata"] == 2 and settings["weighting"] == "eps" and settings["beta"] == 0.7
    assert figures["clip_i"]["settings"]["backbone"] == "fake" and figures["clip_i"]["settings"]["steps"] == 2
    assert len(result["timesteps"][CONTEXT]) == 2 and result["training"] == {}
    mean = sum(one["value"] for one in result["timesteps"][CONTEXT]) / 2
    assert mean == pytest.approx(figures["lfd_context"]["value"])
    assert result["method"] == "lora" and result["noun"] == "sks cat" and not result["anchored"]
    json.dumps(plain(result), allow_nan=False)


def test_best_and_worst_samples_have_their_prompts_and_seeds(sd, protocol, every, tools, known, cache):
    learned = known("lora", learning_rate=0.05)
    pictures = evaluate(sd, learned, protocol, every, cache, tools)["pictures"]
    scores = [card["score"] for card in pictures["best"]] + [card["score"] for card in pictures["worst"]][::-1]
    assert pictures["ranked_by"] == "clip" and len(scores) == 4 and scores == sorted(scores, reverse=True)
    seeds = {card["seed"] for which in ("best", "worst") for card in pictures[which]}
    assert seeds == {EVALUATION_SEED + i for i in range(4)}
    card = pictures["worst"][0]
    template = protocol.prompts(CONTEXT, "cat")[card["seed"] % 2]
    assert card["prompt"] == template.replace("{}", "cat")
    again = sample(sd, [template], [learned.concept], steps=2, scale=2.0, seed=card["seed"])[0]
    torch.testing.assert_close(card["ours"], again, atol=1e-4, rtol=0)
    without = replace(learned, photos=None)
    options = replace(every, metrics=("drift",))
    unranked = evaluate(sd, without, protocol, options, cache, tools)["pictures"]
    assert unranked["ranked_by"] == "" and "best" not in unranked
    chosen = [[card["seed"] for card in one["random"]] for one in (pictures, unranked)]
    assert chosen[0] == chosen[1] and set(chosen[0]) == seeds  # the same samples of every concept


def test_a_second_run_draws_and_measures_nothing(sd, protocol, every, tools, known, tmp_path, monkeypatch):
    learned = known("infusion")
    first = evaluate(sd, learned, protocol, every, Cache(tmp_path), tools)

    def refuse(*_, **__):
        raise AssertionError("this has been made before")

    monkeypatch.setattr(type(sd), "draw_latents", refuse)
    for name in ("errors", "bootstrap"):
        monkeypatch.setattr(stages, name, refuse)
    monkeypatch.setattr(Exactly, "measure", refuse)
    second = evaluate(sd, learned, protocol, every, Cache(tmp_path), tools)
    assert json.dumps(plain(first)) == json.dumps(plain(second))
    with pytest.raises(AssertionError, match="made before"):
        evaluate(sd, learned, protocol, replace(every, strata=3), Cache(tmp_path), tools)


def test_a_killed_run_goes_on_to_the_same_figures(sd, protocol, every, tools, known, tmp_path, monkeypatch, cache):
    learned, calls, original = known("lora"), [], stages.errors

    def killed(**arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(**arguments)

    monkeypatch.setattr(stages, "errors", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(sd, learned, protocol, every, Cache(tmp_path), tools)
    resumed = evaluate(sd, learned, protocol, every, Cache(tmp_path), tools)
    assert len(calls) == 4 + 13  # 4 groups of 2 batches, trained and not, of which 3 were there
    whole = evaluate(sd, learned, protocol, every, cache, tools)
    assert json.dumps(plain(resumed)) == json.dumps(plain(whole))


def test_the_base_models_samples_are_drawn_once_for_all_concepts(
    sd, protocol, options, tools, subject, monkeypatch, cache
):
    drawn, original = [], stages.Stages._denoiser

    def denoiser(self, group, rows, checkpoint, scale):
        drawn.append((checkpoint is None, scale))
        return original(self, group, rows, checkpoint, scale)

    monkeypatch.setattr(stages.Stages, "_denoiser", denoiser)
    evaluate(sd, subject("infusion"), protocol, options, cache, tools)
    assert (True, 2.0) in drawn
    drawn.clear()
    evaluate(sd, subject("lora"), protocol, options, cache, tools)
    assert (True, 2.0) not in drawn and (False, 2.0) in drawn


def test_methods_meet_the_same_noise(sd, protocol, options, tools, subject, monkeypatch, cache):
    """Common random numbers: what is handed to one method's model is handed to the next."""
    seen, original = [], stages.errors

    def record(latents, seeds, **rest):
        seen.append((latents.sum().item(), tuple(seeds)))
        return original(latents=latents, seeds=seeds, **rest)

    monkeypatch.setattr(stages, "errors", record)
    options = replace(options, metrics=("lfd",))
    for name in ("infusion", "dreambooth"):
        evaluate(sd, subject(name), protocol, options, cache, tools)
    assert len(seen) == 32 and seen[:16] == seen[16:]


def test_a_run_has_a_curve_over_its_training(sd, protocol, options, tools, subject, cache):
    files = tuple(
        replace(subject("infusion", steps=n).last.concept, steps=10 * n) for n in (0, 1, 2)
    )  # of one run, as it were
    run = Subject("run", tuple(type(subject("infusion").last).of(concept) for concept in files))
    options = replace(options, metrics=("lfd",), curve=("context", "none"))
    result = evaluate(sd, run, protocol, options, cache, tools)
    curve = result["training"][CONTEXT]
    assert [one["step"] for one in curve] == [0, 10, 20] and result["training_steps"] == 20
    assert abs(curve[0]["value"]) < ROUNDING < curve[1]["value"] < curve[2]["value"]
    assert curve[2]["value"] == result["figures"]["lfd_context"]["value"] and curve[2]["n"] == 4
    assert [one["value"] for one in result["training"]["none"]] == [0, 0, 0]


@pytest.mark.parametrize(
    "change, missing, complaint",
    [
        ({"metrics": ("clip_i",)}, "photos", "--images: clip_i compares with the concept's photos"),
        ({"metrics": ("clip_t",)}, "clip", "--clip: name a folder of CLIP"),
        ({"metrics": ("dino",)}, "dino", "--dino: name a folder of DINO"),
        ({"metrics": ("lfd",)}, "clipseg", "--clipseg: name a folder of CLIPSeg.* lfd needs it"),
        ({"metrics": ("exact",)}, "exact", "--concept: exact figures"),
        ({"metrics": ("div",), "samples": 2}, "", "--samples: div compares .* take at least 3, better 4"),
    ],
)
def test_what_is_missing_is_named(sd, protocol, options, tools, known, change, missing, complaint, cache):
    target = known("infusion", steps=0)
    target = replace(target, **{missing: None}, photos_from="") if missing in ("photos", "exact") else target
    tools = replace(tools, **{missing: None}) if missing in ("clip", "dino", "clipseg") else tools
    with pytest.raises(ValueError, match=complaint):
        evaluate(sd, target, protocol, replace(options, **change), cache, tools)


def test_a_backbone_without_texts_is_no_clip(protocol, options, known):
    class Pixels:
        name, width = "pixels", 3

        def __call__(self, images):
            return images.mean((2, 3))

    with pytest.raises(ValueError, match="--clip: pixels encodes no texts"):
        check(known("infusion", steps=0), protocol, replace(options, metrics=("clip_t",)), Tools(clip=Pixels()))


def test_the_page_on_metrics_runs(sd, tools, subject, tmp_path, monkeypatch):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/metrics.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    shown = {"sd": sd, "tools": tools, "concept": subject("infusion").concept}
    exec(block.replace("samples=32", "samples=2, steps=1"), shown)
    assert shown["result"]["figures"]["lfd_context"]["n"] == 2
    assert "cat, seed 1" in (tmp_path / "outputs/compared/report.html").read_text()


def test_dino_and_lpips_where_there_are_some(sd, protocol, options, tools, known, monkeypatch, cache):
    class Dino:
        name, width = "dino", 3

        def __call__(self, images):
            return F.normalize(images.mean((2, 3)), dim=1)

    tools = replace(tools, dino=Dino(), hashes={"clip": "1", "dino": "2"})
    options = replace(options, metrics=("dino", "pres", "div", "clip_i"))
    figures = evaluate(sd, known("lora", learning_rate=0.05), protocol, options, cache, tools)["figures"]
    assert figures["dino"]["settings"]["backbone"] == figures["pres"]["settings"]["backbone"] == "dino"
    assert figures["clip_i"]["settings"]["backbone"] == "fake" and "dino" in figures["div"]["settings"]["distance"]
    assert figures["dino"]["value"] > 0.9 > figures["clip_i"]["value"]  # mean colours are alike
    seen = []
    monkeypatch.setattr(fidelity, "lpips_diversity", lambda *arguments: seen.append(arguments) or torch.tensor([0.25]))
    tools, options = replace(tools, lpips=Path("alexnet.pth")), replace(options, metrics=("div",), samples=3)
    div = evaluate(sd, known("infusion"), protocol, options, cache, tools)["figures"]["div"]
    assert div["value"] == 0.25 and div["settings"]["distance"] == "LPIPS"
    images, groups, weights = seen[0]
    assert images.shape == (2, 3, 16, 16) and len(groups) == 2  # rows 0 and 2
    assert set(groups) == {protocol.concept[0]} and weights == Path("alexnet.pth")


def test_a_few_samples_do_for_the_pictures_alone(sd, protocol, options, tools, subject, tmp_path):
    options = replace(options, metrics=("lfd",), samples=10, batch_size=10)
    pictures = evaluate(sd, subject("infusion"), protocol, options, Cache(tmp_path), tools)["pictures"]
    (drawn,) = tmp_path.glob("samples-*")
    assert len(load_file(drawn)["latents"]) == 8 and len(pictures["random"]) == 4
