import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from data.pocket_two.identity import Identity
from data.pocket_two.judge import SceneReader
from infusion.concepts import write
from infusion.concepts.concept import Concept
from infusion.inject import cross_attention_layers
from infusion.methods import find_method
from infusion.sampling.pictures import png
from infusion.sampling.sample import sample
from ldm.pipeline import StableDiffusion
from ldm.util.config import ROOT, instantiate, load_config
from ldm.util.files import write as write_file
from scripts.metrics import crop_of, main
from scripts.pocket.networks import WORLDS

PHOTOS = "data/pocket/concepts/green_dotted_elephant"
FAST = ["--samples", "4", "--steps", "1", "--strata", "1", "--resamples", "2", "--batch_size", "4", "--device", "cpu"]
PROTOCOL = """
concept: ["a photo of a {} on grass on the left", "a cartoon of a {} on snow"]
none: [grass]
superclass: ["a photo of a {superclass}"]
neighbours: ["a photo of a {neighbour}"]
others: [owl, bee]
"""


@pytest.fixture(scope="module")
def wide(tiny: Path, tmp_path_factory) -> Path:
    """The tiny backbone, for pictures of the pocket world's size and under its name."""
    path = tmp_path_factory.mktemp("wide") / "wide.yaml"
    path.write_text(tiny.read_text().replace("image_size: 16", "image_size: 64").replace("name: tiny", "name: pocket"))
    return path


@pytest.fixture(scope="module")
def concepts(wide, tmp_path_factory) -> Path:
    """A folder with a run of Infusion, three steps of it, and a LoRA."""
    folder, sd = tmp_path_factory.mktemp("concepts"), StableDiffusion.from_checkpoint(wide)
    generator = torch.Generator().manual_seed(3)
    layers = cross_attention_layers(sd.unet)
    tensors = {n: torch.randn(layer.heads * layer.dim_head, generator=generator) for n, layer in layers.items()}
    whole = Concept(tensors, "elephant", ("a photo of an {}",), "pocket", base_hash=sd.hash)
    for step in (0, 10, 20):
        part = {name: step / 10 * tensor for name, tensor in tensors.items()}
        replace(whole, steps=step, tensors=part).save(folder / f"ours/models/step={step:06d}.safetensors")
    lora = find_method("lora")()
    learned = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in
               lora.start(sd, whole.word).items()}  # fmt: skip
    settings = {"method": "lora", "attention": "own", "options": lora.options, "noun": "sks elephant"}
    replace(whole, tensors=learned, **settings).save(folder / "theirs.safetensors")
    return folder


@pytest.fixture
def run(wide, concepts, tmp_path):
    protocol = tmp_path / "protocol.yaml"
    protocol.write_text(PROTOCOL)

    def start(*arguments: object) -> Path:
        out = tmp_path / "out"
        flags = ["--config", wide, "--personalized_ckpt", f"{concepts}/ours,{concepts}/theirs.safetensors"]
        main([str(word) for word in (*flags, "--protocol", protocol, "--out", out, *FAST, *arguments)])
        return out

    return start


@pytest.fixture
def single_thread():
    """As many threads here as in a process of its own: sums round otherwise on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_two_processes_give_the_results_of_one(run, wide, concepts, tmp_path, single_thread):
    """Rows of samples, errors and features are made by both; one writes."""
    flags = ["--metrics", "lfd,w2,drift", "--clip", "pocket", "--clipseg", "pocket", "--batch_size", "1"]
    alone, both = results(run(*flags)), tmp_path / "both"
    command = [ROOT / "scripts/metrics.py", "--config", wide, *FAST, *flags, "--out", both, "--devices", "2"]
    command += ["--personalized_ckpt", f"{concepts}/ours,{concepts}/theirs.safetensors"]
    command += ["--protocol", tmp_path / "protocol.yaml"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    shared = results(both)
    assert alone.pop("command") != shared.pop("command") and shared == alone
    assert done.stderr.count("open ") == 1
    for file in (tmp_path / "out/cache").glob("*.safetensors"):
        one, two = load_file(file), load_file(both / "cache" / file.name)
        assert all(torch.equal(one[name], two[name]) for name in one)


def results(out: Path) -> dict:
    said = json.loads((out / "metrics.json").read_text())
    assert said.pop("date")
    return said


@pytest.mark.slow
def test_everything_by_default_and_the_second_run_finds_it_all(run, concepts, capsys):
    out = run("--images", PHOTOS)
    said = results(out)
    assert list(said["methods"]) == ["ours", "theirs", "words: a green dotted elephant"]
    ours, theirs, _ = said["methods"].values()
    assert said["settings"]["metrics"] == [
        *("lfd", "w2", "kid", "clip_t", "clip_i", "noun", "pres", "div", "drift", "exact")
    ]
    assert set(said["files"]) == {"base", "clip", "clipseg", "classifier"} and len(set(said["files"].values())) == 4
    assert ours["anchored"] and not theirs["anchored"] and ours["world_concept"] == "green_dotted_elephant"
    for name in ("lfd_none", "lfd_superclass", "lfd_neighbours"):
        assert ours["figures"][name]["value"] == 0 < theirs["figures"][name]["value"]
    assert ours["figures"]["lfd_context"]["value"] > 0 and ours["figures"]["lfd_context"]["n"] == 4
    assert [one["step"] for one in ours["training"]["context"]] == [0, 10, 20]
    assert ours["training"]["context"][0]["value"] < 1e-11 and theirs["training"] == {}
    assert ours["figures"]["clip_i"]["settings"]["backbone"] == "pocket"
    assert {"right_background", "right_style", "right_place", "photos_background"} <= set(ours["figures"])
    assert {"metrics.csv", "report.html", "plots", "cache"} <= {path.name for path in out.iterdir()}
    before = {path: path.stat().st_mtime_ns for path in (out / "cache").iterdir()}
    page = (out / "report.html").read_text()
    assert "theirs" in page and "Zeros that are not a win" in page and "http" not in page
    again = results(run("--images", PHOTOS))
    assert {path: path.stat().st_mtime_ns for path in (out / "cache").iterdir()} == before
    assert json.dumps(again) == json.dumps(said)
    rows = load_file(next((out / "cache").glob("base-*.safetensors")))["latents"]
    assert rows.shape[1:] == (4, 32, 32) and len(rows) <= 4
    with pytest.raises(SystemExit) as stop:
        run("--images", PHOTOS, "--seed", "7")
    assert stop.value.code == 2 and "has results of other concepts or settings" in capsys.readouterr().err


def test_a_base_of_parts_is_measured_when_it_is_named(run, wide, tmp_path):
    part = tmp_path / "vae.safetensors"
    save_file(StableDiffusion.from_config(wide).vae.state_dict(), part)
    with pytest.warns(UserWarning, match="another checkpoint of 'pocket'"):
        said = results(run("--metrics", "drift", "--part", f"vae={part}"))
    assert said["files"]["base"] == StableDiffusion.from_checkpoint(wide, parts={"vae": part}).hash


@pytest.fixture
def drawn(tmp_path):
    """Four pictures that another tool has drawn, and their prompts."""
    generator = torch.Generator().manual_seed(5)
    (tmp_path / "drawn").mkdir()
    for i in range(4):
        pixels = torch.randint(256, (32, 48, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"drawn/{i}.png")
    (tmp_path / "prompts.txt").write_text("a photo of a {} on snow\na cartoon of a {} on sand\n")
    return tmp_path / "drawn"


def test_words_and_pictures_are_rows_beside_concepts(run, drawn, tmp_path):
    flags = ["--images", PHOTOS, "--metrics", "clip_i,clip_t,noun,kid", "--described", "a green dotted elephant"]
    said = results(run(*flags, "--pictures", f"peft={drawn}", "--prompts", tmp_path / "prompts.txt"))
    rows = said["methods"]
    assert [(label, row["kind"], row["group"]) for label, row in rows.items()] == [
        ("ours", "concept", "infusion"),
        ("theirs", "concept", "lora"),
        ("peft", "pictures", "peft"),
        ("words: a green dotted elephant", "words", "words"),
    ]
    for row in rows.values():
        assert set(row["figures"]) == {"clip_i", "clip_t", "noun", "kid"}
        assert row["world_concept"] == "green_dotted_elephant" and row["photos"] == PHOTOS
        assert row["figures"]["noun"]["settings"]["classifier"] == "pocket classifier"
    assert rows["peft"]["prompts"] == ["a photo of a {} on snow", "a cartoon of a {} on sand"]
    assert rows["peft"]["superclass"] == "elephant" and "line i of prompts.txt" in rows["peft"]["prompts_by"]
    likenesses = {row["figures"]["clip_i"]["value"] for row in rows.values()}
    assert len(likenesses) == 4 and {row["figures"]["clip_i"]["ceiling_decoded"]["n"] for row in rows.values()} == {5}
    assert "words: a green dotted elephant" in (tmp_path / "out/report.html").read_text()


def test_the_pocket_world_s_concepts_bring_their_words(run):
    said = results(run("--images", PHOTOS, "--metrics", "clip_t"))
    assert said["methods"]["words: a green dotted elephant"]["described"] == "a green dotted elephant"


def test_pictures_alone_need_no_concept(wide, drawn, tmp_path):
    flags = ["--config", wide, "--pictures", f"peft={drawn}", "--superclass", "elephant", "--out", tmp_path / "alone"]
    for path in drawn.glob("*.png"):
        path.with_suffix(".txt").write_text("a photo of a {} on snow")
    main([str(word) for word in (*flags, *FAST)])
    (row,) = results(tmp_path / "alone")["methods"].values()
    assert {"w2_clip", "kid", "clip_t", "noun", "div"} <= set(row["figures"]) and row["kind"] == "pictures"


@pytest.fixture
def second_world(wide, tmp_path, monkeypatch):
    """A backbone of the second pocket world, and networks with random weights in place of its own."""
    torch.manual_seed(0)
    config = tmp_path / "second.yaml"
    config.write_text(wide.read_text().replace("name: pocket", "name: pocket_two"))
    world = WORLDS["pocket_two"]
    clip = instantiate(load_config(ROOT / world.configs["clip"]).clip, "clip")
    clipseg = instantiate(load_config(ROOT / world.configs["clipseg"]).clipseg, "clipseg")
    decoder = {f"decoder.{name}": tensor for name, tensor in clipseg.network.decoder.state_dict().items()}
    weights = {"clip": clip.state_dict(), "clipseg": decoder}
    weights |= {"identity": Identity().state_dict(), "classifier": SceneReader().state_dict()}
    for name, tensors in weights.items():
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / f"{name}.safetensors")
    files = {name: str(tmp_path / f"{name}.safetensors") for name in weights}
    monkeypatch.setitem(WORLDS, "pocket_two", replace(world, files=files))
    return config


def test_the_second_world_s_networks_measure_its_concepts(second_world, tmp_path):
    sd = StableDiffusion.from_checkpoint(second_world)
    layers = cross_attention_layers(sd.unet)
    tensors = {name: torch.randn(layer.heads * layer.dim_head) for name, layer in layers.items()}
    Concept(tensors, "cat", ("a photo of a {}",), "pocket_two", base_hash=sd.hash).save(tmp_path / "cat.safetensors")
    flags = ["--config", second_world, "--personalized_ckpt", tmp_path / "cat.safetensors", "--out", tmp_path / "out"]
    flags += ["--images", "data/pocket_two/concepts/zigzag_cat", *FAST, "--metrics", "identity,noun,exact,clip_i"]
    main([str(word) for word in flags])
    said = results(tmp_path / "out")
    assert list(said["methods"]) == ["cat", "words: an orange and black zigzag cat"]
    for row in said["methods"].values():
        assert {"identity", "noun", "clip_i", "silhouette", "colour", "texture"} <= set(row["figures"])
        assert row["figures"]["identity"]["settings"]["backbone"] == "identity" and row["world_concept"] == "zigzag_cat"
        assert {"base", "ceiling"} <= set(row["figures"]["texture"]) and "ceiling_decoded" in row["figures"]["identity"]
    assert said["files"].keys() == {"base", "identity", "classifier", "clip", "clipseg"}
    (protocol,) = said["settings"]["protocols"]
    assert protocol.endswith("pocket_two.yaml")


def test_some_metrics_names_and_a_cache_elsewhere(run, tmp_path):
    flags = ["--metrics", "drift", "--labels", "first,second", "--cache", tmp_path / "rows", "--neighbours", "owl,bee"]
    said = results(run(*flags))
    assert list(said["methods"]) == ["first", "second"] and set(said["files"]) == {"base", "clip"}
    assert [set(about["figures"]) for about in said["methods"].values()] == [{"drift"}] * 2
    (prompts,) = said["settings"]["protocols"].values()
    assert prompts["nouns"] == ["owl", "bee"] and list((tmp_path / "rows").iterdir())
    assert not (tmp_path / "out/cache").exists()


def test_prompts_of_each_concept_s_own(run, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text(PROTOCOL.replace("on grass on the left", "on water"))
    said = results(run("--metrics", "clip_t", "--protocol", other))
    ours, theirs = said["methods"].values()
    assert [Path(about["protocol"]).name for about in (ours, theirs)] == ["protocol.yaml", "other.yaml"]
    assert said["settings"]["protocols"][str(other)]["concept"][0] == "a photo of a {} on water"
    bases = [about["figures"]["clip_t"]["base"]["value"] for about in (ours, theirs)]
    assert bases[0] != bases[1]  # the untouched model's own, of other prompts
    page = (tmp_path / "out/report.html").read_text()
    assert "a photo of a {} on water" in page and "a photo of a {} on grass on the left" in page


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--samples", "0"], "--samples: `0` is not a whole number from 1"),
        (["--samples", "1"], "--samples: a distance between clouds (w2) needs at least 2"),
        (["--samples", "2"], "--samples: a distance between clouds (kid) needs at least 3"),
        (["--samples", "2", "--metrics", "div"], "--samples: div compares samples of one prompt"),
        (["--metrics", "lfd,fid"], "--metrics: there is no `fid`"),
        (["--metrics", "clip_i"], "--images: clip_i compares with the concept's photos"),
        (["--metrics", "dino", "--images", PHOTOS], "--dino: name a folder of DINO"),
        (["--metrics", "exact"], "--concept: exact figures are of the pocket world's own"),
        (["--images", "nowhere"], "--images: there is no folder nowhere"),
        (["--images", "a,b,c"], "--images: give one for all or one for each of 2, not 3"),
        (["--images", PHOTOS, "--concept", "elephant"], "--concept: the pocket world has no `elephant`"),
        (["--clip", "nowhere"], "--clip: there is no folder nowhere"),
        (["--clipseg", "nowhere"], "--clipseg: there is no folder nowhere"),
        (["--lpips", "nowhere", "--metrics", "div"], "--lpips: there is no file nowhere"),
        (["--protocol", "nowhere.yaml"], "nowhere.yaml: no such config file"),
        (["--curve", "context,all"], "--curve: there is no group `all`"),
        (["--labels", "one"], "--labels: 1 for 2"),
        (["--groups", "one"], "--groups: 1 for 2"),
        (["--protocol", "b,c"], "--protocol: give one for all or one for each of 2, not 3"),
        (["--described", "a {}"], "--described: `a {}` is not a few words"),
        (
            ["--described", "a cat", "--described", "a dog", "--described", "an owl"],
            "--described: give it once, or once",
        ),
        (["--pictures", "nowhere"], "--pictures: `nowhere` is not such as NAME=FOLDER"),
        (["--pictures", "peft=nowhere"], "--pictures: there is no folder nowhere"),
        (["--pictures", f"ours={PHOTOS}", "--prompts", "README.md"], "--pictures: two rows are called 'ours'"),
        (["--pictures", f"peft={PHOTOS}", "--prompts", "nowhere"], "--prompts: there is no file nowhere"),
        (["--pictures", f"peft={PHOTOS}", "--metrics", "clip_t"], "0.png has no prompt: give one in 0.txt"),
        (["--prompts", "README.md"], "--prompts: these are of --pictures"),
        (["--tau", "0"], "--tau: `0` is not above 0"),
        (["--steps", "1000"], "--steps: `1000` is not a whole number from 1 to 999"),
        (["--dinov2", "nowhere"], "--dinov2: there is no folder nowhere"),
        (["--identity", "nowhere"], "--identity: there is no file nowhere"),
        (["--metrics", "identity", "--images", PHOTOS], "--identity: name the weights"),
        (["--superclass", "cat"], "--superclass: the files say it themselves: 'elephant'"),
        (["--noun", "rex"], "--noun: the files say it themselves: 'elephant'"),
        (["--personalized_ckpt", "nowhere.safetensors"], "nowhere.safetensors: there is no such concept file"),
        (["--config", "configs/backbone/sd15.yaml", "--ckpt", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(run, capsys, tmp_path, arguments, complaint):
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and complaint in line
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def too_long(tmp_path_factory) -> tuple[Path, Path]:
    """A folder of five epochs of a LoRA in sd-scripts' layout, and photos for which the third is right.

    In the third, "dog" reads as "blue striped dog" to every cross-attention, and the photos are its samples. The first
    two go a part of the way, the others far beyond.
    """
    sd, folder = StableDiffusion.from_checkpoint(ROOT / "configs/backbone/pocket.yaml"), tmp_path_factory.mktemp("long")
    (dog,) = sd.text.tokenizer(["dog"])[0, 1:2].tolist()

    def encode(word: str) -> torch.Tensor:
        prompts = [f"{start} {word}{end}" for start in ("a photo of a", "a") for end in ("", " on grass")]
        places = [ids.tolist().index(dog) for ids in sd.text.tokenizer(prompts)]
        return torch.stack([sd.text([p])[0, at] for p, at in zip(prompts, places, strict=True)]).mean(0)

    noun, other = encode("dog"), sd.text(["a photo of a dog"])[0, [0, 1, 2, 3, 10]].mean(0)
    key = noun - other * (noun @ other) / (other @ other)
    tensors = {}
    for name, layer in cross_attention_layers(sd.unet).items():
        for part in ("to_k", "to_v"):
            change = layer.get_submodule(part).weight.detach() @ (encode("blue striped dog") - noun)
            tensors |= {
                f"{name}.{part}.weight.down": key[None] / (key @ noun),
                f"{name}.{part}.weight.up": change[:, None],
            }
    facts = {"method": "lora", "attention": "own", "options": {"rank": 1, "alpha": 1.0, "identifier": ""}}
    right = Concept(tensors, "dog", ("a photo of a {}",), "pocket", sd.hash, **facts)
    for i, image in enumerate(sample(sd, ["a photo of a {}"] * 6, [right], steps=5, scale=5.0, seed=9)):
        write_file(folder / f"photos/{i}.png", png(image))
    for i, share in enumerate((0.25, 0.5, 1.0, 2.5, 4.0), 1):
        part = {name: tensor * (share if name.endswith("up") else 1) for name, tensor in tensors.items()}
        path = folder / f"epochs/rex-{i:06d}.safetensors"
        write.write(replace(right, tensors=part), path, "kohya", {})
        save_file(load_file(path), path, {"ss_base_model_version": "pocket"})  # all that it says
    return folder / "epochs", folder / "photos"


@pytest.mark.slow
def test_of_epochs_of_a_lora_that_was_trained_too_long_the_right_one_is_named(too_long, tmp_path, caplog):
    epochs, photos = too_long
    files, protocol = sorted(epochs.iterdir(), reverse=True), tmp_path / "protocol.yaml"
    protocol.write_text(PROTOCOL.replace("cartoon", "photo"))
    command = ["--personalized_ckpt", *files, "--images", photos, "--superclass", "dog", "--metrics", "clip_i,lfd,noun"]
    command += ["--out", tmp_path / "out", "--protocol", protocol, "--device", "cpu"]
    command += ["--samples", "6", "--steps", "5", "--scale", "5", "--strata", "1"]
    caplog.set_level("INFO")
    main([*map(str, command)])
    said = results(tmp_path / "out")
    assert list(said["methods"]) == [f"rex-{i:06d}" for i in range(1, 6)]
    (found,) = said["epochs"]
    assert (found["keep"], found["overfitting_from"]) == ("rex-000003", "rex-000004")
    assert found["in_words"].startswith("Keep rex-000003: likeness (CLIP-I) 0.")
    assert "LFD around the concept rises from" in found["in_words"] and found["in_words"] in caplog.text
    page = (tmp_path / "out/report.html").read_text()
    assert found["in_words"] in page and "rex-000003 ★" in page


def test_weights_of_another_model_are_refused_before_anything_is_loaded(concepts, tmp_path, capsys):
    """By its names and shapes: a file of SD 1.5, of which only the first layers are there."""
    layers = {
        "input_blocks.0.0.weight": (320, 4, 3, 3),
        "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
    }
    tensors = {f"model.diffusion_model.{name}": torch.zeros(shape) for name, shape in layers.items()}
    tensors |= {"first_stage_model.x": torch.zeros(1), "cond_stage_model.x": torch.zeros(1)}
    save_file(tensors, tmp_path / "other.safetensors")
    flags = ["--ckpt", tmp_path / "other.safetensors", "--out", tmp_path / "out"]
    for words, complaint in (
        (flags, "other.safetensors is SD 1.5; use configs/backbone/sd15.yaml, and the concepts are for pocket"),
        (["--config", ROOT / "configs/backbone/pocket_two.yaml", *flags], "it does not fit 'pocket_two'"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([*map(str, ("--personalized_ckpt", concepts / "theirs.safetensors", *words))])
        assert stop.value.code == 2 and complaint in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_one_photo_is_not_enough(run, capsys, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/0.png").write_bytes((ROOT / PHOTOS / "0.png").read_bytes())
    with pytest.raises(SystemExit) as stop:
        run("--images", tmp_path / "photos")
    assert stop.value.code == 2 and "fewer than 2 photos" in capsys.readouterr().err


def test_features_of_another_model_are_refused(run, concepts, capsys, tmp_path):
    other = replace(Concept.load(concepts / "theirs.safetensors"), architecture="sd15")
    other.save(tmp_path / "other.safetensors")
    with pytest.raises(SystemExit) as stop:
        run("--personalized_ckpt", tmp_path / "other.safetensors", "--metrics", "drift")
    assert stop.value.code == 2 and "does not fit 'pocket'" in capsys.readouterr().err


def trained(file: Path, folder: str = "photos/cat") -> SimpleNamespace:
    """A row of a concept file."""
    return SimpleNamespace(pictures=None, photos_from=folder, crop="", last=SimpleNamespace(file=str(file)))


@pytest.mark.parametrize(
    ("config", "crop"),
    [
        ("data: {params: {images: {params: {crop: middle}}}}", "middle"),
        ("data: {params: {images: {params: {crop: subject}}}}", "subject"),
        ("data: {params: {concepts: [], crop: middle}}", "middle"),  # many concepts in one training
        ("data: {params: {images: {params: {mask: none}}}}", "middle"),  # before there was the key
        (None, "subject"),
    ],
)
@pytest.mark.parametrize("name", ["models/step=000001.safetensors", "models/cat/step=000001.safetensors"])
def test_photos_are_cropped_as_the_run_was_trained_on_them(tmp_path, config, crop, name):
    if config is not None:
        (tmp_path / "config.yaml").write_text(config)
    assert crop_of(trained(tmp_path / name), []) == crop


def test_photos_of_pictures_are_cropped_as_those_of_the_concept_beside_them():
    before = [trained(Path("a")), trained(Path("b"), "photos/dog")]
    before[0].crop, before[1].crop = "middle", "subject"
    row = SimpleNamespace(pictures="x", photos_from="photos/cat")
    assert crop_of(row, before) == "middle" and crop_of(row, []) == "subject"
