import struct
import time
import warnings
import zlib
from dataclasses import asdict
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from infusion.sampling.png import (
    FILES,
    FLAGS,
    KNOWN,
    NEW,
    SAMPLERS,
    defaults,
    describe,
    parameters,
    read_parameters,
    recall,
)
from infusion.sampling.settings import FORMER, Settings
from ldm.diffusion.schedulers import SAMPLERS as OURS

SAID = describe(Settings(), {"prompt": "a {}", "seed": 3, "config": "c.yaml"}, {"base_sha256": "ab"})


def save(path: Path, said: dict[str, str], size: tuple[int, int] = (2, 2), **options: object) -> Path:
    info = PngImagePlugin.PngInfo()
    for key, value in said.items():
        info.add_text(key, value, **options)
    Image.new("RGB", size).save(path, pnginfo=info)
    return path


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def handmade(path: Path, *chunks: bytes, size: tuple[int, int] = (2, 2)) -> Path:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks))
    return path


def refused(path: Path) -> str:
    with pytest.raises(ValueError) as error:
        recall(path)
    said = str(error.value)
    assert said.startswith(f"{path}: ") and "\n" not in said and len(said) < len(str(path)) + 300
    return said


def test_what_is_described_is_recalled(tmp_path):
    assert recall(save(tmp_path / "a.png", SAID)) == SAID
    assert recall(save(tmp_path / "a.png", SAID, zip=True)) == SAID


def test_pictures_from_before_a_flag_was_there_are_recalled(tmp_path):
    old = {name: value for name, value in SAID.items() if name not in NEW}
    found = defaults(recall(save(tmp_path / "a.png", old)))
    assert found["prompt"] == "a {}" and not set(NEW) & set(found)


def test_pictures_that_say_settings_by_their_older_names_are_recalled(tmp_path):
    old = {older: SAID[name] for older, name in FORMER.items() if older != "ddim_steps"}
    rest = {name: value for name, value in SAID.items() if name not in FORMER.values()} | {"steps": "7"}
    found = defaults(recall(save(tmp_path / "a.png", rest | old | {"ddim_eta": "0.5", "W": "24"})))
    assert found["eta"] == "0.5" and found["width"] == "24" and found["steps"] == "7"
    assert not set(FORMER) & set(found)


def test_a_target_word_is_said_once():
    said = describe(Settings(noun=["cat"]), {"target_word": ["cat"]}, {})
    assert said["target_word"] == "cat" and not said["noun"]


def test_the_base_models_weights_are_said_as_their_flags_take_them():
    said = describe(Settings(), {"part": {"vae": "a.pt", "text": "b.pt"}, "use_ema": False}, {})
    assert said["part"] == "vae=a.pt,text=b.pt" and defaults(said)["use_ema"] is False
    assert defaults(said | {"use_ema": "True"})["use_ema"] is True


def test_keys_of_others_are_passed_over(tmp_path):
    others = {
        "outdir": "/tmp/x",
        "from_png": "b.png",
        "skip_save": "1",
        "device": "cuda",
        "__class__": "x",
        "x" * 79: "y",
    }
    text = recall(save(tmp_path / "a.png", SAID | others))
    assert text == SAID
    assert not set(others) & set(defaults(text))


def test_no_value_names_a_place_to_write_to():
    """Of all flags, those that a picture may set: files are read only."""
    assert set(defaults(dict.fromkeys(KNOWN, "1"))) == {*FLAGS, *asdict(Settings()), "n_samples", "n_iter"}
    assert set(FILES) == {"config", "ckpt", "part", "personalized_ckpt", "covariance"} <= set(FLAGS)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("config", "//host/share/x.yaml", "its config names no file of this machine"),
        ("ckpt", "\\\\host\\share\\x", "its ckpt names no file of this machine"),
        ("personalized_ckpt", "a.safetensors,https://x.org/b", "its personalized_ckpt names no file"),
        ("covariance", "a\nb", "its covariance names no file"),
        ("part", "vae=a.safetensors,unet=//host/share/x", "its part names no file of this machine"),
    ],
)
def test_values_that_no_flag_has(tmp_path, key, value, message):
    info = PngImagePlugin.PngInfo()
    for name, said in (SAID | {key: value}).items():
        info.add_itxt(name, said)
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png", pnginfo=info)
    assert message in refused(tmp_path / "a.png")


def test_text_that_is_packed_a_thousand_times_smaller(tmp_path):
    bomb = chunk(b"zTXt", b"prompt\0\0" + zlib.compress(bytes(50_000_000)))
    assert "cannot be read as a picture" in refused(handmade(tmp_path / "a.png", bomb, chunk(b"IDAT", b"")))


def test_pixels_are_not_read(tmp_path):
    texts = [chunk(b"tEXt", f"{key}\0{value}".encode()) for key, value in SAID.items()]
    huge = handmade(tmp_path / "a.png", *texts, chunk(b"IDAT", b"no pixels"), size=(12_000, 10_000))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert recall(huge) == SAID
        assert recall(handmade(tmp_path / "b.png", *texts, chunk(b"IDAT", b""), size=(2**30, 2**30))) == SAID


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"GIF89a" + bytes(99), b"P6 2 2 255\n" + bytes(99)])
def test_other_files(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    assert "cannot be read as a picture" in refused(tmp_path / "a.png")


def test_other_pictures(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    assert "does not say how it was made (prompt is lacking)" in refused(tmp_path / "a.png")
    assert "cannot be read" in refused(tmp_path / "missing.png")


def test_others_see_prompt_and_settings():
    settings = Settings(width=768, height=512, sampler="dpmpp_2m", negative_prompt="blurry, dark")
    flags = {"prompt": "a {}", "seed": 3, "config": "c.yaml", "ckpt": "ckpt/sd,1.5.safetensors"}
    said = describe(settings, flags, {"base_sha256": "6ce0161689b3"})
    lines = parameters(said, "a cat, (red:1.2)").split("\n")
    assert lines[:2] == ["a cat, (red:1.2)", "Negative prompt: blurry, dark"]
    assert lines[2] == (
        "Steps: 50, Sampler: DPM++ 2M Karras, CFG scale: 7.5, Seed: 3, "
        "Size: 768x512, Model hash: 6ce0161689, Model: sd_1.5"
    )
    found, ignored = read_parameters(parameters(said, "a cat, (red:1.2)"))
    assert found == {
        **{"prompt": "a cat, (red:1.2)", "negative_prompt": "blurry, dark", "steps": "50", "scale": "7.5", "seed": "3"},
        **{"sampler": "dpmpp_2m", "width": "768", "height": "512"},
    }
    assert ignored == ["Model hash: 6ce0161689", "Model: sd_1.5"]
    assert "Negative" not in parameters(said | {"negative_prompt": ""}, "a cat")


def test_every_sampler_has_a_name_there():
    assert SAMPLERS.keys() == OURS.keys()


def test_a_picture_of_a1111_is_read_as_far_as_it_goes(tmp_path, caplog):
    text = (
        "a cat on grass,\n<lora:style:0.8> red\nNegative prompt: blurry,\ndark\nSteps: 20, Sampler: Euler a, "
        'Schedule type: Automatic, CFG scale: 7, Seed: 5, Size: 512x768, Clip skip: 2, Lora hashes: "style: ab, x: c"'
    )
    found = recall(save(tmp_path / "a.png", {"parameters": text}))
    assert found == {
        **{"prompt": "a cat on grass, red", "negative_prompt": "blurry, dark", "steps": "20", "scale": "7"},
        **{"seed": "5", "sampler": "euler_a", "width": "512", "height": "768"},
    }
    assert defaults(found)["prompt"] == "a cat on grass, red"
    (record,) = caplog.records
    ignored = record.getMessage().split("ignored: ")[1]
    assert ignored == '<lora:style:0.8>; Clip skip: 2; Lora hashes: "style: ab, x: c"'


@pytest.mark.parametrize(
    ("text", "prompt", "ignored"),
    [
        ("just words: with, commas: here", "just words: with, commas: here", []),
        ("a cat\nSteps: 5, Sampler: DPM++ SDE, Seed: 1", "a cat", ["Sampler: DPM++ SDE"]),
        ("a cat\nSteps: 5, Seed: 1, Size: big", "a cat", ["Size: big"]),
        ("Steps: 5, Seed: 1, Size: 8x8", "", []),
    ],
)
def test_odd_texts_of_others(text, prompt, ignored):
    found, left = read_parameters(text)
    assert found["prompt"] == prompt and left == ignored


def test_a_long_text_of_others_takes_no_time():
    started = time.process_time()
    read_parameters("a" * 200_000 + "\n" + "b c" * 200_000 + "<lora:" * 20_000)
    assert time.process_time() - started < 2
