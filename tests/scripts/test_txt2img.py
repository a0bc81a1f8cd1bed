import hashlib
import os
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from infusion.concepts.concept import Concept
from infusion.covariance import InverseCovariance, save_inverse
from infusion.inject import cross_attention_layers
from infusion.sampling.prompts import Job
from infusion.sampling.sample import sample
from infusion.sampling.settings import Settings
from ldm.pipeline import StableDiffusion
from ldm.util.config import ROOT
from ldm.weights.checkpoint import PREFIXES
from ldm.weights.names import ema_name
from scripts.infusion_txt2img import main, plan

FAST = ["--steps", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def sd(tiny: Path) -> StableDiffusion:
    return StableDiffusion.from_checkpoint(tiny)


@pytest.fixture(scope="module")
def concept(sd, tmp_path_factory) -> Path:
    generator = torch.Generator().manual_seed(3)
    layers = cross_attention_layers(sd.unet)
    tensors = {n: 3 * torch.randn(layer.heads * layer.dim_head, generator=generator) for n, layer in layers.items()}
    path = tmp_path_factory.mktemp("concept") / "cat.safetensors"
    Concept(tensors, "cat", ("a photo of a {}",), sd.architecture, base_hash=sd.hash).save(path)
    return path


@pytest.fixture
def draw(tiny, concept, tmp_path):
    """Runs the command; returns its output folder."""

    def run(*arguments: object) -> Path:
        words = ["--config", tiny, "--outdir", tmp_path / "out", *FAST, *arguments]
        words += [] if "--personalized_ckpt" in arguments else ["--personalized_ckpt", concept]
        main(list(map(str, words)))
        return tmp_path / "out"

    return run


def test_two_processes_draw_the_images_of_one(draw, tiny, concept, tmp_path):
    """The images of one prompt are shared; one process writes."""
    which = ["--prompt", "a {}", "--n_samples", "3"]
    alone, both = draw(*which), tmp_path / "both"
    words = ["--config", tiny, "--personalized_ckpt", concept, "--outdir", both, *FAST, *which, "--devices", "2"]
    program = [sys.executable, ROOT / "scripts/infusion_txt2img.py", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(word) for word in program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in (alone / "samples").iterdir())
    assert names == sorted(path.name for path in (both / "samples").iterdir()) and len(names) == 3
    for name in names:
        first, second = (Image.open(folder / "samples" / name) for folder in (alone, both))
        assert np.abs(np.asarray(first).astype(int) - np.asarray(second)).max() <= 1 and first.text == second.text
    assert len(list(both.glob("grid-*.png"))) == 1


def test_processes_share_images_and_prompts():
    flags = Namespace(n_iter=1, n_samples=3, seed=0)
    sizes = [len(seeds) for _, _, seeds in plan(flags, [Job("a", Settings())], ["a"], world=2)]
    assert sizes == [2, 1]
    batches = plan(flags, [Job("a", Settings()), Job("b", Settings())], ["a", "b"], world=2)
    assert [(job.prompt, list(seeds)) for job, _, seeds in batches] == [("a", [0, 1, 2]), ("b", [3, 4, 5])]


def test_no_seed_of_a_line_is_drawn_twice():
    flags = Namespace(n_iter=3, n_samples=4, seed=100)
    jobs = [Job("a", Settings(), seed=7), Job("b", Settings())]
    batches = plan(flags, jobs, templates=["a", "b"], world=1)
    seeds = {name: [list(seeds) for job, _, seeds in batches if job.prompt == name] for name in "ab"}
    assert seeds["a"] == [[7, 8, 9, 10], [11, 12, 13, 14], [15, 16, 17, 18]]
    assert seeds["b"] == [[104, 105, 106, 107], [112, 113, 114, 115], [120, 121, 122, 123]]


@pytest.fixture
def refused(draw, capsys):
    """The one line that the command ends with, with exit code 2."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            draw(*arguments)
        assert stop.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return run


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def text(path: Path) -> dict[str, str]:
    with Image.open(path) as image:
        return image.text


def test_image_i_has_the_seed_plus_i_whatever_the_batches(draw, sd, concept):
    out = draw("--prompt", "a {} on a hill", "--n_samples", "3", "--seed", "7", "--scale", "3")
    expected = sample(sd, ["a {} on a hill"] * 3, [Concept.load(concept)], steps=2, scale=3.0, seed=7)
    expected = expected.permute(0, 2, 3, 1).mul(255).round().numpy()
    for i in range(3):
        assert np.abs(pixels(out / f"samples/0000{i}.png") - expected[i]).max() <= 1
    draw("--prompt", "a {} on a hill", "--n_samples", "1", "--n_iter", "3", "--seed", "7", "--scale", "3")
    for i in range(3):  # numbering goes on
        again, first = out / f"samples/0000{3 + i}.png", out / f"samples/0000{i}.png"
        assert text(again)["seed"] == text(first)["seed"] == str(7 + i)
        assert np.abs(pixels(again).astype(int) - pixels(first)).max() <= 1
    assert sorted(path.name for path in out.glob("*.png")) == ["grid-0000.png", "grid-0001.png"]


def test_the_png_says_how_it_was_made(draw, sd, concept, tiny):
    out = draw(
        "--prompt", "a “{}”", "--n_samples", "1", "--strength", "0.5", "--tau", "0.2", "--negative_prompt", "fog"
    )
    said = text(out / "samples/00000.png")
    concept_hash = hashlib.sha256(concept.read_bytes()).hexdigest()
    for_others = said.pop("parameters")  # with the concept's word in the prompt
    assert for_others.startswith("a “cat”\nNegative prompt: fog\nSteps: 2, Sampler: DDIM, ")
    assert said == {
        "prompt": "a “{}”", "seed": "42", "steps": "2", "scale": "7.5", "sampler": "ddim", "eta": "0.0",
        "negative_prompt": "fog", "height": "16", "width": "16", "beta": "0.7", "tau": "0.2", "strength": "0.5",
        "gate": "", "precision": "full", "target_word": "", "noun": "", "region": "", "config": str(tiny), "ckpt": "",
        "part": "", "use_ema": "False",
        "personalized_ckpt": str(concept), "personalized_sha256": concept_hash, "base_sha256": sd.hash,
        "covariance": "", "covariance_sha256": "identity",
    }  # fmt: skip


def test_prompts_of_a_file_samplers_sizes_and_the_grid(draw, tmp_path):
    (tmp_path / "prompts.txt").write_text("a {}\n\n  a photo of a {} in the rain\n", encoding="utf-8")
    out = draw("--from-file", tmp_path / "prompts.txt", "--n_samples", "2", "--n_rows", "4", "--H", "24", "--W", "8",
               "--sampler", "euler_a", "--precision", "autocast")  # fmt: skip
    texts = [text(path) for path in sorted((out / "samples").iterdir())]
    prompts = ["a {}"] * 2 + ["a photo of a {} in the rain"] * 2
    assert [(t["prompt"], t["seed"]) for t in texts] == [(p, str(42 + i)) for i, p in enumerate(prompts)]
    assert pixels(out / "samples/00000.png").shape == (24, 8, 3)
    assert pixels(out / "grid-0000.png").shape == (24 + 2 * 2, 4 * 8 + 5 * 2, 3)
    assert text(out / "grid-0000.png")["prompt"] == "a {}\na photo of a {} in the rain"


def test_lines_of_a_file_have_options_of_their_own(draw, sd, concept, tmp_path):
    lines = ["# the first is drawn as the flags say", "a {} outside", "the {} --n fog, rain --w 24 --s 3 --l 2.5 --d 5"]
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    out = draw("--from-file", tmp_path / "prompts.txt", "--n_samples", "1", "--n_iter", "2", "--seed", "9")
    said = [text(path) for path in sorted((out / "samples").iterdir())]
    assert [one["seed"] for one in said] == ["9", "5", "11", "6"]
    assert [one["prompt"] for one in said] == ["a {} outside", "the {}"] * 2
    assert {"negative_prompt": "", "width": "16", "steps": "2", "scale": "7.5"}.items() <= said[0].items()
    own = {"negative_prompt": "fog, rain", "width": "24", "height": "16", "steps": "3", "scale": "2.5"}
    assert own.items() <= said[1].items()
    shapes = [pixels(out / f"grid-000{i}.png").shape for i in range(2)]
    assert shapes == [(16 + 4, 16 + 4, 3), (16 + 4, 24 + 4, 3)] or shapes[0][0] > 20  # one of each size
    settings = Settings(steps=3, scale=2.5, negative_prompt="fog, rain", width=24)
    alone = sample(sd, ["the {}"], [Concept.load(concept)], settings, seed=5)[0].permute(1, 2, 0).numpy()
    assert np.abs(pixels(out / "samples/00001.png") / 255 - alone).max() < 0.01


def test_a_picture_is_drawn_again_from_what_it_says(draw, concept, tiny, tmp_path):
    words = ["--prompt", "a cat on a {}", "--replace_word", "big hill", "--sampler", "euler_a", "--gate", "hard"]
    boxes = ["--region", "1:0,0,0.5,1", "1:.5,.5,1,1"]
    first = draw(*words, *boxes, "--n_samples", "3", "--seed", "3", "--beta", "0.4", "--H", "24")
    picture = first / "samples/00002.png"
    main(["--from-png", str(picture), "--outdir", str(tmp_path / "again"), "--device", "cpu"])
    (again,) = (tmp_path / "again/samples").iterdir()
    assert np.abs(pixels(again).astype(int) - pixels(picture)).max() <= 2
    assert text(again) == text(picture)
    main(["--from-png", str(picture), "--outdir", str(tmp_path / "again"), "--device", "cpu", "--strength", "0"])
    assert np.abs(pixels(tmp_path / "again/samples/00001.png").astype(int) - pixels(picture)).max() > 2


def test_a_seed_that_is_drawn_is_printed(draw, caplog):
    caplog.set_level("INFO")
    which = ["--seed", "-1", "--n_samples", "1", "--skip_grid"]
    out = [draw(*which) for _ in range(2)][0]
    seeds = [text(out / f"samples/0000{i}.png")["seed"] for i in (0, 1)]
    assert [message for message in caplog.messages if message.startswith("seed ")] == [f"seed {seed}" for seed in seeds]
    assert seeds[0] != seeds[1] and all(0 <= int(seed) < 2**32 for seed in seeds)


def test_a_word_that_is_there_twice_is_told(draw, caplog):
    caplog.set_level("INFO")
    which = ["--prompt", "a dog beside a Dog", "--n_samples", "1", "--skip_grid"]
    draw(*which, "--target_word", "dog")
    assert "--prompt: 'dog' is there again; the concept is at {} in 'a {} beside a Dog'" in caplog.messages


def test_concepts_are_named_together_or_one_by_one(draw, concept, tmp_path):
    comma = tmp_path / "old, grey cat.safetensors"
    comma.write_bytes(concept.read_bytes())
    which = ["--prompt", "a {1} and a {2}", "--n_samples", "1", "--skip_grid"]
    draw(*which, "--personalized_ckpt", f"{comma},{concept}")
    out = draw(*which, "--personalized_ckpt", comma, "--personalized_ckpt", concept)
    together, apart = (out / f"samples/0000{i}.png" for i in (0, 1))
    assert text(together) == text(apart) and (pixels(together) == pixels(apart)).all()
    main(["--from-png", str(apart), "--outdir", str(tmp_path / "out"), "--device", "cpu"])
    assert text(out / "samples/00002.png") == text(apart)


def test_a_picture_of_other_files_is_drawn_with_a_warning(draw, concept, tmp_path, caplog):
    picture = draw("--n_samples", "1", "--skip_grid") / "samples/00000.png"
    weaker = Concept.load(concept)
    replace(weaker, tensors={name: t / 2 for name, t in weaker.tensors.items()}).save(tmp_path / "weaker.safetensors")
    caplog.set_level("WARNING")
    main(["--from-png", str(picture), "--outdir", str(tmp_path / "again"), "--device", "cpu"])
    assert not caplog.records
    draw("--from-png", picture, "--personalized_ckpt", tmp_path / "weaker.safetensors")
    (record,) = caplog.records
    assert "made with another file: personalized_sha256 differs" in record.message


@pytest.fixture
def averaged(tiny, concept, tmp_path) -> tuple[Path, Path]:
    """A checkpoint with averages that are not its weights, and a concept that was trained on them."""
    tensors = load_file(tiny.with_suffix(".safetensors"))
    start = PREFIXES["unet"]
    averages = {ema_name(n.removeprefix(start)): t * 1.1 for n, t in tensors.items() if n.startswith(start)}
    save_file(tensors | averages, tmp_path / "both.safetensors")
    base = StableDiffusion.from_checkpoint(tiny, tmp_path / "both.safetensors", use_ema=True)
    trained = replace(Concept.load(concept), base_hash=base.hash, base_use_ema=True)
    trained.save(tmp_path / "trained.safetensors")
    return tmp_path / "both.safetensors", tmp_path / "trained.safetensors"


def test_a_concept_is_drawn_on_the_averages_that_it_was_trained_on(draw, averaged, tiny, tmp_path, caplog, recwarn):
    file, trained = averaged
    words = ["--ckpt", file, "--personalized_ckpt", trained, "--n_samples", "1", "--skip_grid"]
    out = draw(*words)
    draw(*words, "--use_ema")
    assert not recwarn.list and not [record for record in caplog.records if record.levelname == "WARNING"]
    with pytest.warns(UserWarning, match="another checkpoint of 'tiny' .* its own has --use_ema"):
        draw(*words, "--no-use_ema")
    with pytest.warns(UserWarning, match="its own has --use_ema"):
        draw("--personalized_ckpt", trained, "--n_samples", "1", "--skip_grid")  # a file without averages
    assert "the concept was trained on averaged weights, and" in caplog.text
    first, same, plain, other = (pixels(out / f"samples/0000{i}.png").astype(int) for i in range(4))
    assert np.array_equal(first, same) and np.array_equal(plain, other) and np.abs(first - plain).max() > 2
    assert [text(out / f"samples/0000{i}.png")["use_ema"] for i in range(4)] == ["True", "True", "False", "False"]
    for i, drawn in ((0, first), (2, plain)):
        main(["--from-png", str(out / f"samples/0000{i}.png"), "--outdir", str(tmp_path / f"{i}"), "--device", "cpu"])
        assert np.abs(pixels(tmp_path / f"{i}/samples/00000.png").astype(int) - drawn).max() <= 2


def test_some_concepts_of_averages_and_some_not_are_drawn_on_the_plain_weights(draw, averaged, concept, caplog):
    file, trained = averaged
    words = ["--personalized_ckpt", f"{trained},{concept}", "--prompt", "a {1} and a {2}", "--n_samples", "1"]
    with pytest.warns(UserWarning, match="another checkpoint"):
        out = draw("--ckpt", file, *words)
    assert "some of the concepts were trained on averaged weights: --use_ema takes them for all" in caplog.text
    assert text(out / "samples/00000.png")["use_ema"] == "False"


def test_a_base_of_parts_is_the_one_of_the_training(draw, tiny, concept, tmp_path, recwarn):
    part = tmp_path / "vae.safetensors"
    save_file(StableDiffusion.from_config(tiny).vae.state_dict(), part)
    base = StableDiffusion.from_checkpoint(tiny, parts={"vae": part})
    trained = replace(Concept.load(concept), base_hash=base.hash, base_parts=base.parts)
    trained.save(tmp_path / "trained.safetensors")
    words = ["--personalized_ckpt", tmp_path / "trained.safetensors", "--n_samples", "1", "--skip_grid"]
    out = draw(*words, "--part", f"vae={part}")
    main(["--from-png", str(out / "samples/00000.png"), "--outdir", str(out), "--device", "cpu", "--skip_grid"])
    assert not recwarn.list
    with pytest.warns(UserWarning, match=f"its own has --part vae=FILE .sha256 {base.parts['vae'][:12]}"):
        draw(*words)
    first, same, other = (pixels(out / f"samples/0000{i}.png").astype(int) for i in range(3))
    assert np.abs(first - same).max() <= 2 < np.abs(first - other).max()
    assert text(out / "samples/00001.png")["part"] == f"vae={part}"


def test_words_of_the_prompt_may_be_the_concept(draw):
    out = draw("--prompt", "A Cat and a cat", "--target_word", "cat", "--n_samples", "1", "--skip_grid")
    draw("--prompt", "A {} and a cat", "--replace_word", "Cat", "--n_samples", "1", "--skip_grid")
    draw("--prompt", "A Cat and a {}", "--replace_word", "cat", "--n_samples", "1", "--skip_grid")
    first, same, other = (pixels(out / f"samples/0000{i}.png").astype(int) for i in range(3))
    assert np.abs(first - same).max() <= 1 < np.abs(first - other).max()
    assert text(out / "samples/00000.png")["target_word"] == "cat"


def test_what_is_skipped_is_not_written(draw):
    out = draw("--n_samples", "1", "--skip_grid")
    assert not list(out.glob("*.png")) and len(list((out / "samples").iterdir())) == 1
    draw("--n_samples", "1", "--skip_save")
    assert [path.name for path in out.glob("*.png")] == ["grid-0000.png"]
    assert len(list((out / "samples").iterdir())) == 1


def test_strength_zero_and_no_concept_are_the_base_model(draw, tiny, tmp_path):
    out = draw("--n_samples", "1", "--strength", "0", "--skip_grid")
    draw("--n_samples", "1", "--skip_grid")
    main(["--config", str(tiny), "--prompt", "a photo of a cat", "--n_samples", "1", "--outdir", str(out), *FAST])
    none, ours, base = (pixels(out / f"samples/0000{i}.png").astype(int) for i in range(3))
    assert np.abs(none - base).max() <= 1 < np.abs(ours - base).max()
    assert text(out / "samples/00002.png")["personalized_ckpt"] == ""


def test_a_concept_trained_with_a_covariance_wants_its_file(draw, refused, sd, concept, tmp_path):
    root = 5 * torch.randn(24, 2, generator=torch.Generator().manual_seed(1))
    file, other = tmp_path / "c.safetensors", tmp_path / "other.safetensors"
    save_inverse(file, root @ root.mT + torch.eye(24), {"base_architecture": "tiny"})
    save_inverse(other, torch.eye(24), {"base_architecture": "tiny"})
    learned, inverse = Concept.load(concept), InverseCovariance(file)
    weighed = replace(learned, covariance=inverse.fingerprint)
    weighed.save(tmp_path / "weighed.safetensors")
    arguments = ["--personalized_ckpt", tmp_path / "weighed.safetensors", "--n_samples", "1", "--skip_grid"]
    named = ["--covariance", file]
    assert "its gate needs the same file (--covariance FILE)" in refused(*arguments)
    assert "its gate needs the same file (--covariance FILE)" in refused(*arguments, "--covariance", other)
    assert "'cat' was trained without a covariance" in refused("--covariance", file)
    assert "no --personalized_ckpt is given" in refused(*named, "--personalized_ckpt", "")
    assert not (tmp_path / "out").exists()

    out = draw(*arguments, *named, "--prompt", "the old {} outside")
    said = text(out / "samples/00000.png")
    assert (said["covariance"], said["covariance_sha256"]) == (str(file), inverse.fingerprint)
    prompts, options = ["the old {} outside"], {"steps": 2, "seed": 42}
    expected = sample(sd, prompts, [weighed], inverse_covariance=inverse.matrix, **options)
    plain = sample(sd, prompts, [learned], **options)
    drawn = pixels(out / "samples/00000.png").astype(float) / 255
    assert np.abs(drawn - expected[0].permute(1, 2, 0).numpy()).max() < 0.01
    assert np.abs(drawn - plain[0].permute(1, 2, 0).numpy()).max() > 0.01


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--personalized_ckpt", "nowhere.safetensors"], "error: nowhere.safetensors: there is no such concept file"),
        (["--prompt", "a", "--from-file", "x"], "not allowed with argument"),
        (["--outdir", str(ROOT / "README.md/new")], "README.md: is a file; name a folder to write to"),
        (["--H", "30"], "error: height must be a multiple of 4 pixels, such as 28 or 32, not 30"),
        (["--tau", "0"], "--tau: must be above 0"),
        (["--strength", "1,2"], "give one strength for all concepts"),
        (["--ddim_eta", "0.5", "--sampler", "euler"], "only the ddim sampler"),
        (["--skip_grid", "--skip_save"], "leave nothing to write"),
        (["--gate", "soft"], "--gate: must be one of sigmoid, hard, global, not 'soft'"),
        (["--region", "2:0,0,1,1"], "the region 2:0,0,1,1 is of no concept"),
        (["--target_word", "dog", "--prompt", "a cat"], "has no word 'dog'"),
        (["--target_word", "cat"], "by a placeholder or by a word, not by both"),
        (["--target_word", "cat", "--noun", "cat"], "not both"),
        (["--from-png", str(ROOT / "docs/pocket-world.png")], "pocket-world.png: does not say how it was made"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(refused, tmp_path, arguments, complaint):
    line = refused(*arguments)
    assert line.startswith("error: ") and complaint in line
    assert not (tmp_path / "out").exists()


def test_the_backbone_comes_from_the_concept_file(concept, tmp_path, capsys):
    for words in (["--personalized_ckpt", str(concept)], []):
        with pytest.raises(SystemExit) as stop:
            main([*words, "--outdir", str(tmp_path / "out")])
        assert stop.value.code == 2
    unknown, none = capsys.readouterr().err.splitlines()
    assert unknown.startswith("error: --config: the concept was trained on 'tiny', which is not one of pocket, ")
    assert none.startswith("error: --personalized_ckpt: name a concept file")


def test_images_that_are_not_finite_are_named_and_not_written(draw, monkeypatch, capsys, tmp_path):
    decode = StableDiffusion.decode

    def overflow(sd, latents):
        images = decode(sd, latents)
        images[1] = torch.nan
        return images

    monkeypatch.setattr(StableDiffusion, "decode", overflow)
    with pytest.raises(SystemExit) as ended:
        draw("--prompt", "a photo of a {}", "--n_samples", "3", "--seed", "7")
    assert ended.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: 1 of the images are not written") and "'a photo of a {}', seed 8;" in line
    names = sorted(path.name for path in (tmp_path / "out/samples").iterdir())
    assert names == ["00000.png", "00001.png"]
    assert [Image.open(tmp_path / "out/samples" / name).text["seed"] for name in names] == ["7", "9"]


def test_a_lora_of_another_tool_needs_no_placeholder(tmp_path):
    """On pocket, by sd-scripts' names; its trigger is a word of the prompt like any other."""
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_v"
    tensors = {f"{layer}.lora_down.weight": torch.ones(1, 128), f"{layer}.lora_up.weight": torch.ones(192, 1)}
    save_file(tensors, tmp_path / "style.safetensors", {"modelspec.trigger_phrase": "sks"})
    flags = ["--steps", "1", "--n_samples", "1", "--skip_grid", "--device", "cpu"]
    drawn = []
    for name, prompt, strength in (("a", "a sks dog", "1"), ("b", "a {} dog", "1"), ("c", "a sks dog", "0")):
        out = ["--outdir", str(tmp_path / name), "--prompt", prompt, "--strength", strength]
        main(["--personalized_ckpt", str(tmp_path / "style.safetensors"), *out, *flags])
        drawn.append(pixels(tmp_path / name / "samples/00000.png"))
    assert np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])
