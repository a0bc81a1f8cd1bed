"""Prompts on the command line and in files."""

import os

import pytest
from PIL import Image

from infusion.sampling.settings import LONGEST
from tests.bad_input.bench import POCKET

DRAW = [
    *("--personalized_ckpt", "CONCEPT", "--outdir", "FOLDER/out", "--device", "cpu"),
    *("--steps", "1", "--n_samples", "1", "--skip_grid"),
]
BASE = ["--config", POCKET, "--outdir", "FOLDER/out", "--device", "cpu", "--steps", "1", "--n_samples", "1"]

PROMPTS: dict[str, tuple[str, str]] = {  # what is refused, and what is said
    "empty": ("", "--prompt"),
    "no place": ("a photo of a dog", "--prompt: 'a photo of a dog' has no {} for the concept"),
    "a brace": ("a {", "--prompt: 'a {' has no {}"),
    "attribute": ("a {a.__class__}", "has no {}"),
    "format": ("a {!r:>999999999}", "has no {}"),
    "zero": ("a {0}", "{0}"),
    "second": ("a {1} and a {2}", "{2}"),
    "large": ("a {999999999999}", "{999999999999}"),
    "places alone": ("{}" * 1000, "is longer than the 240 tokens that are read"),
    "glued": ("a{}b", "--prompt: {} in 'a{}b' is glued"),
    "longer than is read": ("red " * 600 + "{}", "--prompt: 'red red"),
    "10,000 words": ("a {} " + "word " * 10_000, f"--prompt: has 50,005 characters; at most {LONGEST:,}"),
    "a surrogate": ("a {} \udcff", "--prompt"),
    "escapes": ("a \x1b[31mred\x1b[0m thing\a", "has no {}"),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_a_prompt_that_cannot_be_drawn_is_named(bench, case):
    prompt, says = PROMPTS[case]
    bench.refuse("txt2img", *DRAW, f"--prompt={prompt}", says=says)


def test_a_negative_prompt_longer_than_is_read_is_named(bench):
    bench.refuse("txt2img", *DRAW, f"--negative_prompt={'red ' * 601}", says="--negative_prompt: 'red red")


FOREIGN = {  # a prompt -> what of it is named
    "a {} (on grass:1.2)": "'(on grass:1.2)'",
    "a {} BREAK on grass": "'BREAK'",
    "a {} <lora:style:0.8>": "'<lora:style:0.8>'",
    "a {} [by night] ((red))": "'[by night]', '((red))'",
    "a {} {red|blue} __colour__": "'{red|blue}', '__colour__'",
}


@pytest.mark.parametrize("prompt", FOREIGN)
@pytest.mark.parametrize("place", ["--prompt", "--negative_prompt", "--from-file"])
def test_syntax_of_other_tools_is_named(bench, prompt, place):
    (bench.folder / "prompts.txt").write_text(f"a {{}}\n{prompt}\n")
    value = {"--prompt": prompt, "--negative_prompt": prompt.replace("a {}", "a")}.get(place, "prompts.txt")
    many = ["--n_samples", "2", "--n_iter", "1000000"]  # which are refused after what is said of the words
    found = bench.run("txt2img", *DRAW, f"{place}={value}", *many)
    assert found.status == 2
    assert f"warning: {place}: " in found.err or "prompts.txt: line 2: " in found.err
    assert f"{FOREIGN[prompt]}: syntax of other tools" in found.err


@pytest.mark.parametrize("flag", ["--negative_prompt", "--noun", "--target_word"])
def test_other_words_are_no_longer_than_prompts(bench, flag):
    words = "a dog", f"{flag}={'word' * 10_000}"
    bench.refuse("txt2img", *DRAW, f"--prompt={'a {}' if flag != '--target_word' else words[0]}", words[1], says=flag)


DRAWN = {
    "many places": "{} " * 200,
    "right to left": "a {} \u202ednih\u202c \u200f",
    "emoji": "a {} 🐈‍⬛ \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "control characters": "a {} \x07\x1b[31m",
    "75 words and more": "a {} " + "word " * 200,
}


@pytest.mark.parametrize("case", DRAWN)
def test_an_odd_prompt_is_drawn_and_remembered(bench, case):
    bench.work("txt2img", *DRAW, f"--prompt={DRAWN[case]}")
    with Image.open(bench.folder / "out/samples/00000.png") as image:
        assert image.size == (64, 64) and image.text["prompt"] == DRAWN[case]


def test_without_a_concept_nothing_need_be_said(bench):
    bench.work("txt2img", *BASE, "--prompt=")
    assert Image.open(bench.folder / "out/samples/00000.png").size == (64, 64)


FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "prompts.txt: has no prompt in it"),
    "binary": (bytes(range(256)) * 100, "prompts.txt: cannot be read as text: save it as UTF-8"),
    "utf-16 without a mark": ("ä {}\n".encode("utf-16-le"), "prompts.txt: cannot be read as text: save it as UTF-8"),
    "1 MB of zeros": (bytes(1_000_000), "prompts.txt: cannot be read as text: save it as UTF-8"),
    "10 MB": (b"a {} on grass\n" * 750_000, "prompts.txt: is larger than 2,000,000 bytes"),
    "longer than is read": (b"a {}\na {}" + b" red" * 600, "prompts.txt: line 2: 'a dog red"),
    "negative prompt longer than is read": (b"a {}\na {} --n" + b" red" * 601, "prompts.txt: line 2: 'red red"),
    "1 MB in a line": (b"a {} " + b"word " * 200_000, "characters; at most"),
    "1 MB, the last line wrong": (b"a {} on grass\n" * 70_000 + b"a {} --w many\n", "line 70001: --w: `many`"),
    "unknown option": (b"a {}\na {} --x 3\n", "prompts.txt: line 2: there is no option --x"),
    "no prompt": (b"--w 64\n", "prompts.txt: line 1: has options and no prompt"),
    "width of a word": (b"a {} --w wide\n", "prompts.txt: line 1: --w: `wide` is not a whole number"),
    "width that cannot be halved": (
        b"a {}\na {} --w 63\n",
        "such as 48 or 64, not 63 (--width)",
    ),
    "width of a wall": (b"a {}\na {} --w 100000\n", "width: must be from 1 to 8,192"),
    "steps of many": (b"a {}\na {} --s 5000\n", "--steps: must be from 1 to 999"),
    "scale": (b"a {}\na {} --l nan\n", "prompts.txt: line 2: --l: `nan` is not a finite number"),
    "seed": (b"a {}\na {} --d -1\n", "prompts.txt: line 2: --d"),
    "negative prompt": (b"a {}\na {} --n " + b"word " * 10_000, "characters; at most"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_prompt_file_that_cannot_be_drawn_is_named(bench, case):
    content, says = FILES[case]
    (bench.folder / "prompts.txt").write_bytes(content)
    bench.refuse("txt2img", *DRAW, "--from-file", "prompts.txt", says=says)


@pytest.mark.parametrize("name", ["gone.txt", "folder", "a\0b", "x" * 300])
def test_a_prompt_file_that_is_none_is_named(bench, name):
    (bench.folder / "folder").mkdir()
    bench.refuse("txt2img", *DRAW, "--from-file", name, says="--from-file")


def test_apostrophes_in_prompts_and_brackets_in_folders_are_what_they_are(bench):
    (bench.folder / "prompts.txt").write_text("it's a {}, isn't it\n")
    for _ in range(2):
        bench.work("txt2img", *DRAW, "--from-file", "prompts.txt", "--outdir", "FOLDER/out [1]")
    said = [Image.open(bench.folder / f"out [1]/samples/0000{i}.png").text["prompt"] for i in (0, 1)]
    assert said == ["it's a {}, isn't it"] * 2


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_prompt_file_of_windows_is_read(bench, encoding):
    (bench.folder / "prompts.txt").write_bytes("a {}\r\na {} in Zürich\r\n".encode(encoding))
    bench.work("txt2img", *DRAW, "--from-file", "prompts.txt")
    said = [Image.open(bench.folder / f"out/samples/0000{i}.png").text["prompt"] for i in (0, 1)]
    assert said == ["a {}", "a {} in Zürich"]


def forged(bench, **text: str) -> None:
    """A picture that says of itself what a picture of ours does, but for some of it."""
    from infusion.sampling.pictures import png
    from infusion.sampling.png import describe
    from infusion.sampling.settings import Settings

    said = describe(Settings(steps=1), {"prompt": "a {}", "seed": 1, "personalized_ckpt": str(bench.concept)}, {})
    (bench.folder / "made.png").write_bytes(png(Image.new("RGB", (64, 64)), said | text))


PNGS: dict[str, tuple[dict[str, str], str]] = {
    "steps": ({"steps": "many"}, "--steps"),
    "sampler of an attribute": ({"sampler": "__class__"}, "__class__"),
    "size": ({"height": "1000000000"}, "--height"),
    "beta": ({"beta": "nan"}, "--beta"),
    "seed": ({"seed": "-5"}, "--seed"),
    "region": ({"region": "1:0,0,2,2"}, "region"),
    "prompt": ({"prompt": "a dog"}, "has no {}"),
    "concept": ({"personalized_ckpt": "gone.safetensors"}, "gone.safetensors"),
    "config": ({"config": "/etc/passwd"}, "/etc/passwd"),
    "weights": ({"ckpt": "/etc/passwd"}, "/etc/passwd"),
    "covariance": ({"covariance": "/etc/passwd"}, "/etc/passwd"),
}


@pytest.mark.parametrize("case", PNGS)
def test_what_a_picture_says_is_held_to_what_flags_are(bench, case):
    said, says = PNGS[case]
    forged(bench, **said)
    flags = ["--outdir", "FOLDER/out", "--device", "cpu", "--from-png", "made.png"]
    bench.refuse("txt2img", *flags, says=says)


def test_a_picture_that_says_all_is_drawn_again(bench):
    forged(bench)
    bench.work("txt2img", "--outdir", "FOLDER/out", "--device", "cpu", "--from-png", "made.png", "--skip_grid")
    assert Image.open(bench.folder / "out/samples/00000.png").text["seed"] == "1"


@pytest.mark.parametrize("case", ["no picture", "a photo", "bomb", "pipe", "folder", "nothing"])
def test_a_picture_that_says_nothing_is_named(bench, case):
    path = bench.folder / "made.png"
    make = {
        "no picture": lambda: path.write_text("a picture"),
        "a photo": lambda: Image.new("RGB", (64, 64)).save(path),
        "bomb": lambda: Image.new("1", (16_000, 16_000)).save(path),
        "pipe": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "nothing": lambda: None,
    }
    make[case]()
    bench.refuse("txt2img", "--outdir", "FOLDER/out", "--from-png", "made.png", says="made.png")
