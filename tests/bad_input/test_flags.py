"""Numbers, names and folders in the flags of every command."""

import pytest
from PIL import Image

from ldm.util.config import ROOT
from tests.bad_input.bench import POCKET

DRAW = ["--personalized_ckpt", "CONCEPT", "--outdir", "FOLDER/out", "--device", "cpu", "--steps", "1"]
PHOTOS = str(ROOT / "data/pocket/concepts/blue_striped_dog")
MEASURE = [
    *("--personalized_ckpt", "CONCEPT", "--images", PHOTOS, "--metrics", "clip_i", "--out", "FOLDER/out"),
    *("--samples", "2", "--steps", "1", "--device", "cpu"),
]
SEGMENT = ["--image_dir", "FOLDER", "--super_class", "dog", "--model_weight", "pocket", "--device", "cpu"]
ESTIMATE = [
    *("--caption", ROOT / "README.md", "--save_path", "FOLDER/C.safetensors", "--config", POCKET),
    *("--device", "cpu"),
]
CONVERT = ["CONCEPT", "FOLDER/out.safetensors"]
COUNTS = ("0", "1.5", "1e9", str(10**30), "٣")
REALS = ("nan", "1e400", "abc", "")
SEEDS = ("-1", str(2**70), "1.5")

FLAGS: dict[str, tuple[list, dict[str, tuple[str, ...]]]] = {  # command -> flags that it needs, values that are refused
    "txt2img": (
        DRAW,
        {
            "--steps": (*COUNTS, "1000"),
            "--n_samples": ("0", "1000000000"),
            "--n_iter": ("0", "999999999"),
            "--n_rows": ("0",),
            "--height": ("0", "63", "100000"),
            "--width": ("63", "100000"),
            "--seed": ("-2", *SEEDS[1:]),
            "--scale": REALS,
            "--beta": ("nan", "1,,2", "0.1,0.2"),
            "--tau": ("nan", "0", "-1"),
            "--strength": ("inf", "x"),
            "--eta": ("nan", "-0.1", "1.1"),
            "--gate": ("soft", "hard,hard", ","),
            "--region": ("1", "1:0,0,2,2", "2:0,0,1,1", "0:0,0,1,1", f"{10**30}:0,0,1,1"),
            "--sampler": ("heun",),
            "--precision": ("double",),
            "--device": ("tpu", "cuda:99", ""),
            "--devices": ("0", "1000000"),
            "--num_nodes": ("0",),
            "--covariance": ("gone", "FOLDER"),
            "--config": ("gone", "FOLDER"),
            "--outdir": ("FOLDER/file", "FOLDER/file/within"),
            "--noun": (",", "a,b"),
            "--target_word": ("unicorn",),
            "--colour": ("red",),
        },
    ),
    "metrics": (
        MEASURE,
        {
            "--samples": ("0", "many"),
            "--batch_size": ("0", "1e9"),
            "--steps": ("0", "1000"),
            "--strata": ("0", "1001"),
            "--resamples": ("0",),
            "--seed": ("-1",),
            "--scale": ("nan",),
            "--beta": ("nan",),
            "--tau": ("0",),
            "--strength": ("inf",),
            "--metrics": ("clip", ","),
            "--curve": ("x",),
            "--devices": ("1000000",),
            "--out": ("FOLDER/file",),
            "--cache": ("FOLDER/file",),
            "--protocol": ("gone", "FOLDER", "FOLDER/file"),
            "--labels": ("a,b",),
            "--groups": ("a,b",),
            "--concept": ("unicorn",),
            "--clip": ("gone", "FOLDER", "FOLDER/file"),
            "--dino": ("FOLDER", "FOLDER/file"),
        },
    ),
    "soft_segment": (
        SEGMENT,
        {
            "--batch_size": ("0", "many"),
            "--super_class": ("", "  "),
            "--templates": ("a photo", ""),
            "--model_weight": ("gone", "FOLDER", "FOLDER/file"),
            "--device": ("tpu",),
        },
    ),
    "estimate": (
        ESTIMATE,
        {
            "--batch_size": ("0",),
            "--ridge": ("-1", "nan", "x"),
            "--caption": ("gone", "FOLDER"),
            "--save_path": ("C.pt",),
            "--ckpt": ("gone", "FOLDER", "FOLDER/file"),
        },
    ),
    "demo": (
        ["--outdir", "FOLDER/out"],
        {
            "--samples": ("1", "1e9", "x"),
            "--steps": ("0", "1000"),
            "--batch_size": ("0",),
            "--scale": ("nan",),
            "--seed": ("-1",),
            "--concepts": ("unicorn", ""),
            "--base": ("gone", "FOLDER"),
            "--clip": ("gone", "FOLDER/file"),
            "--clipseg": ("gone", "FOLDER/file"),
            "--classifier": ("gone", "FOLDER/file"),
            "--outdir": ("FOLDER/file/within",),
        },
    ),
    "benchmark": (
        ["--device", "cpu", "--size", "pocket", "--only", "unet"],
        {
            "--latent": ("0", "33", "1000000000", "x"),
            "--repeats": ("0",),
            "--only": ("unett", ","),
            "--size": ("sd9",),
            "--precision": ("double",),
            "--device": ("tpu",),
            "--json": ("FOLDER/file", "FOLDER/file/within"),
        },
    ),
    "convert": (
        CONVERT,
        {"--form": ("tiny",), "--superclass": ("cat",), "--gate": ("soft",), "--architecture": ("sd9",)},
    ),
}
CASES = [
    (command, flag, value)
    for command, (_, flags) in FLAGS.items()
    for flag, values in flags.items()
    for value in values
]


@pytest.mark.parametrize(("command", "flag", "value"), CASES)
def test_a_flag_that_makes_no_sense_is_named(bench, command, flag, value):
    (bench.folder / "file").write_text("mine")
    Image.new("RGB", (64, 64), "red").save(bench.folder / "photo.png")
    said = value.replace("FOLDER", str(bench.folder)).replace("/within", "")
    line = bench.refuse(command, *FLAGS[command][0], f"{flag}={value}", says="")
    assert flag.lstrip("-") in line or (said and said in line), line


@pytest.mark.parametrize("command", ["txt2img", "metrics"])
def test_an_output_folder_without_permission_is_named(bench, as_nobody, command):
    bench.folder.chmod(0o555)
    with as_nobody():
        bench.refuse(command, *FLAGS[command][0], says=f"{bench.folder}: cannot be written to")


def test_a_target_that_is_there_is_left_alone(bench):
    (bench.folder / "out.safetensors").write_text("mine")
    bench.refuse("convert", *CONVERT, says="out.safetensors: is there already")
    bench.refuse("convert", "CONCEPT", "FOLDER/out.ckpt", says="out.ckpt: the name must end in .safetensors")
    bench.refuse("convert", "CONCEPT", "FOLDER/out.safetensors/x.safetensors", says="out.safetensors")
