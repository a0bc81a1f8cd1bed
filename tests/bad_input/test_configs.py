"""Configs that are none, and numbers that make no sense, through `main.py --base`."""

import pytest

from ldm.util.config import ROOT

PHOTOS = f"data_root={ROOT}/data/pocket/concepts/blue_striped_dog"
QUICK = ["callbacks.samples=null", "trainer.max_steps=1", "trainer.enable_progress_bar=false", PHOTOS]
TRAIN = ["-t", "--logdir", "FOLDER/run", *QUICK]
DEMO = f"include: {ROOT}/configs/pocket_demo.yaml\n"
MODEL = "model: {target: TARGET, params: {}}\ndata: {target: data.latents.ConceptData, params: {}}\n"

FILES: dict[str, tuple[str | bytes | None, str]] = {  # what the file holds (None: nothing is there), and what is said
    "missing": (None, "entry.yaml: no such config file"),
    "empty": ("", "entry.yaml"),
    "comments": ("# nothing\n", "entry.yaml"),
    "no yaml": ("superclass: [cat\n", "entry.yaml: not a readable YAML file"),
    "tabs": ("trainer:\n\tmax_steps: 1\n", "entry.yaml: not a readable YAML file"),
    "a list": ("- a\n- b\n", "entry.yaml: a config is a mapping"),
    "a text": ("just words\n", "entry.yaml: a config is a mapping"),
    "utf-16": ("superclass: dog\n".encode("utf-16"), "entry.yaml: not a readable YAML file"),
    "a picture": ((ROOT / "data/pocket/concepts/blue_striped_dog/0.png").read_bytes(), "entry.yaml"),
    "double key": (DEMO + "superclass: dog\nsuperclass: cat\n", "superclass"),
    "python object": (DEMO + "name: !!python/object/apply:os.system ['touch ran']\n", "entry.yaml"),
    "include of itself": ("include: entry.yaml\n", "entry.yaml: includes itself"),
    "include of nothing": ("include: gone.yaml\n", "gone.yaml: no such config file"),
    "include of a number": ("include: 3\n", "include"),
    "unknown resolver": (DEMO + "superclass: ${shell:ls}\n", "shell"),
    "interpolation of nothing": (DEMO + "superclass: ${sub.class}\n", "sub"),
    "interpolation of itself": (DEMO + "superclass: ${superclass}\n", "superclass"),
    "interpolation that is cut off": (DEMO + "superclass: '${sub'\n", "superclass"),
    "misspelt key": (DEMO + "superclas: dog\n", "unknown key `superclas`: nothing refers to it; did you mean `superc"),
    "misspelt node": (DEMO + "trainr: {max_steps: 1}\n", "unknown key `trainr`"),
    "misspelt parameter": (DEMO + "model: {params: {lerning_rate: 1}}\n", "did you mean `learning_rate`?"),
    "no model": ("data: {target: data.latents.ConceptData}\n", "entry.yaml: the config has no `model`"),
    "model of nothing": (DEMO + "model: null\n", "model"),
    "model of a number": (DEMO + "model: 3\n", "model"),
    "model of a text": (DEMO + "model: cat\n", "model"),
    "trainer of a number": (DEMO + "trainer: 3\n", "trainer"),
    "trainer of a list": (DEMO + "trainer: [1]\n", "entry.yaml"),
    "callbacks of a number": (DEMO + "callbacks: 3\n", "callbacks"),
    "callbacks of a text": (DEMO + "callbacks: [cat]\n", "entry.yaml"),
    "parts of a list": (DEMO + "parts: [vae]\n", "entry.yaml"),
    "ckpt of a number": (DEMO + "ckpt: 3\n", "ckpt: Training wants str | None here, not 3"),
    "a program": (MODEL.replace("TARGET", "os.system"), "model.target"),
    "no class": (MODEL.replace("TARGET", "infusion.training.trainer.train"), "model.target"),
    "no module": (MODEL.replace("TARGET", "infusion.nothing.Trainer"), "model.target"),
    "target of a list": (MODEL.replace("TARGET", "[a, b]"), "model.target"),
    "params of a list": (
        "model: {target: infusion.training.trainer.ConceptTrainer, params: [1]}\ndata: {}\n",
        "model.params",
    ),
    "superclass of a number": (DEMO + "superclass: 3\n", "superclass"),
    "superclass of nothing": (DEMO + "superclass: ''\n", "superclass"),
    "superclass of blanks": (DEMO + "superclass: '  '\n", "superclass"),
    "superclass of a control character": (DEMO + 'superclass: "\\u0007"\n', "superclass"),
    "templates of a text": (DEMO + "templates: a photo of a {}\n", "templates"),
    "templates of numbers": (DEMO + "templates: [1, 2]\n", "templates"),
    "templates of nothing": (DEMO + "templates: []\n", "templates"),
    "template without a place": (DEMO + "templates: [a photo]\n", "templates: 'a photo' must have {}"),
    "template with an attribute": (DEMO + "templates: ['{a.__class__} {}']\n", "templates"),
    "template with a number": (DEMO + "templates: ['{1} {}']\n", "templates"),
    "template with a brace": (DEMO + "templates: ['{ {}']\n", "templates"),
    "glued template": (DEMO + "templates: ['a{}s']\n", "glued"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_config_that_is_none_is_named(bench, case):
    content, says = FILES[case]
    if content is not None:
        (bench.folder / "entry.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    bench.refuse("main.py", "--base", "entry.yaml", says=says)


def test_a_config_that_is_a_folder_is_named(bench):
    (bench.folder / "entry.yaml").mkdir()
    bench.refuse("main.py", "--base", "entry.yaml", *TRAIN, says="entry.yaml: no such config file")


NUMBERS: dict[str, tuple[str, ...]] = {  # override -> values that make no sense
    "learning_rate": ("0", "-1", "nan", "1e400", "many"),
    "batch_size": ("0", "-1", "1.5"),
    "flip_p": ("1.5", "nan"),
    "seed": ("-1", "1.5", str(2**70), "nan"),
    "save_every": ("0", "-1", "1.5"),
    "trainer.max_steps": ("-2", "1.5", "nan"),
    "trainer.accumulate_grad_batches": ("0",),
    "trainer.devices": ("0",),
    "trainer.precision": ("12",),
    "trainer.gradient_clip_val": ("nan",),
    "callbacks.concept.params.every": ("0", "-1", "nan"),
    "sd.params.image_size": ("0", "63"),
    "data.params.images.params.image_size": ("-64", "63"),
    "model.params.weight_decay": ("-1", "nan"),
    "model.params.prior_weight": ("-1", "nan"),
    "model.params.gate.params.tau": ("0", "nan"),
    "model.params.gate.params.beta": ("inf",),
    "model.params.gate.params.kind": ("soft",),
    "model.params.seed": ("-1", str(2**70)),
    "model.params.method.params.layers": ("'['", "nowhere"),
    "weights": ("half", "3"),
    "ckpt": ("gone.safetensors",),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in NUMBERS.items() for value in values])
def test_a_number_that_makes_no_sense_is_named(bench, key, value):
    words = [*TRAIN, f"{key}={value}"]
    bench.refuse("main.py", "--base", ROOT / "configs/pocket_demo.yaml", *words, says=key.rpartition(".")[2])


METHODS: dict[str, tuple[str, ...]] = {  # method and its parameter -> values that make no sense
    "lora.rank": ("0", "1.5"),
    "lora.alpha": ("nan", "inf"),
    "lora.seed": ("-1", str(2**70)),
    "perfusion.token_learning_rate": ("0", "-1", "nan"),
    "perfusion.momentum": ("-0.1", "1.5", "nan"),
    "custom_diffusion.identifier": ("''", "3"),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in METHODS.items() for value in values])
def test_a_methods_number_that_makes_no_sense_is_named(bench, key, value):
    method, _, name = key.partition(".")
    files = [ROOT / f"configs/{file}.yaml" for file in ("backbone/pocket", "data/photos", f"method/{method}")]
    override = f"model.params.method.params.{name}={value}"
    words = [*TRAIN, "superclass=dog", "trainer.precision=32-true", override]
    bench.refuse("main.py", "--base", *files, *words, says=name)


PRIOR = {
    "count": ("0", "-1"),
    "prompt": ("''", "3"),
    "steps": ("0", "-1", "100000"),
    "scale": ("nan", "inf"),
    "seed": ("-1", str(2**70)),
    "batch_size": ("0", "-1"),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in PRIOR.items() for value in values])
def test_a_number_of_the_class_images_that_makes_no_sense_is_named(bench, name, value):
    files = [ROOT / f"configs/{file}.yaml" for file in ("backbone/pocket", "data/photos", "method/dreambooth")]
    words = [*TRAIN, "superclass=dog", "trainer.precision=32-true", f"data.params.prior.params.{name}={value}"]
    bench.refuse("main.py", "--base", *files, *words, says=name)


SAMPLES = {
    "every": ("0", "-1"),
    "steps": ("0", "-1", "100000"),
    "scale": ("nan", "inf"),
    "seed": ("-1", str(2**70)),
    "prompts": ("[]", "[a photo]", "[3]", "'{}'", "['{1} {}']", "['{999999999999} {}']"),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in SAMPLES.items() for value in values])
def test_a_number_of_the_samples_that_makes_no_sense_is_named(bench, name, value):
    words = [*TRAIN[:3], *TRAIN[4:], f"callbacks.samples.params.{name}={value}"]
    bench.refuse("main.py", "--base", ROOT / "configs/pocket_demo.yaml", *words, says=name)


WORDS: dict[str, tuple[list[str], str]] = {  # flags and overrides -> what is said
    "no value": (["superclass="], "superclass"),
    "no key": (["=dog"], "override `=dog`"),
    "no sign": (["superclass"], "unknown argument `superclass`"),
    "unknown key": (["superklass=dog"], "did you mean `superclass`?"),
    "unknown key within": (["trainer.max_step=1"], "did you mean `max_steps`?"),
    "open bracket": (["templates=[a {}"], "templates"),
    "open brace": (["model={"], "model"),
    "index": (["templates[99]=a {}"], "templates"),
    "into a number": (["seed.x=1"], "seed"),
    "missing photos": (["data_root=gone"], "data_root: there is no folder gone"),
    "seed": (["--seed", "-1"], "seed"),
    "a large seed": (["--seed", str(2**70)], "seed"),
    "devices": (["--devices", "0"], "devices"),
    "negative devices": (["--devices", "-3"], "devices"),
    "devices of a word": (["--devices", "many"], "devices"),
    "gpus": (["--gpus", "-1"], "--gpus"),
    "gpus of a word": (["--gpus", "first"], "--gpus"),
    "machines": (["--num_nodes", "0"], "num_nodes"),
    "strategy": (["--strategy", "hope"], "strategy"),
    "name with a folder": (["-n", "../../up"], "--name"),
    "unknown flag": (["--lr", "1"], "unknown argument `--lr`"),
    "unknown component": (["parts.vea=x"], "did you mean `vae`?"),
    "component of nothing": (["parts.vae=gone"], "parts.vae: there is no file gone"),
}


@pytest.mark.parametrize("case", WORDS)
def test_a_word_of_the_command_line_that_makes_no_sense_is_named(bench, case):
    words, says = WORDS[case]
    folder = [] if case == "name with a folder" else TRAIN[1:3]
    base = ["--base", ROOT / "configs/pocket_demo.yaml", "-t", *folder, *QUICK]
    bench.refuse("main.py", *base, *words, says=says)


def test_a_run_folder_that_is_a_file_is_named(bench):
    (bench.folder / "run").write_text("mine")
    bench.refuse("main.py", "--base", ROOT / "configs/pocket_demo.yaml", *TRAIN, says="--logdir")
