"""Configs, and values in them, that make no sense, through `main.py --base`. The loader itself: `test_config.py`."""

import pytest

from ldm.util.config import ROOT

PHOTOS = f"data_root={ROOT}/data/pocket/concepts/blue_striped_dog"
QUICK = ["trainer.max_steps=1", "trainer.enable_progress_bar=false", PHOTOS]
TRAIN = ["-t", "--logdir", "FOLDER/run", *QUICK]
DEMO = f"include: {ROOT}/configs/pocket_demo.yaml\n"
MODEL = "model: {target: TARGET, params: {}}\ndata: {target: data.latents.ConceptData, params: {}}\n"

FILES: dict[str, tuple[str | bytes, str]] = {  # what the file holds, and what is said
    "empty": ("", "entry.yaml"),
    "no yaml": ("superclass: [cat\n", "entry.yaml: not a readable YAML file"),
    "a list": ("- a\n- b\n", "entry.yaml: a config is a mapping"),
    "utf-16": ("superclass: dog\n".encode("utf-16-le"), "entry.yaml: cannot be read as text: save it as UTF-8"),
    "double key": (DEMO + "superclass: dog\nsuperclass: cat\n", "superclass"),
    "python object": (DEMO + "name: !!python/object/apply:os.system ['touch ran']\n", "entry.yaml"),
    "include of itself": ("include: entry.yaml\n", "entry.yaml: includes itself"),
    "unknown resolver": (DEMO + "superclass: ${shell:ls}\n", "shell"),
    "interpolation of itself": (DEMO + "superclass: ${superclass}\n", "superclass"),
    "misspelt key": (DEMO + "superclas: dog\n", "unknown key `superclas`: nothing refers to it; did you mean `superc"),
    "misspelt parameter": (DEMO + "model: {params: {lerning_rate: 1}}\n", "did you mean `learning_rate`?"),
    "no model": ("data: {target: data.latents.ConceptData}\n", "entry.yaml: the config has no `model`"),
    "model of a number": (DEMO + "model: 3\n", "model"),
    "trainer of a list": (DEMO + "trainer: [1]\n", "entry.yaml"),
    "callbacks of a number": (DEMO + "callbacks: 3\n", "callbacks"),
    "a concept that is not there": (DEMO + "start_from: gone\n", "start_from: there is no concept file gone"),
    "ckpt of a number": (DEMO + "ckpt: 3\n", "ckpt: Training wants str | None here, not 3"),
    "a program": (MODEL.replace("TARGET", "os.system"), "model.target"),
    "no class": (MODEL.replace("TARGET", "infusion.training.trainer.train"), "model.target"),
    "superclass of blanks": (DEMO + "superclass: '  '\n", "superclass"),
    "superclass of a control character": (DEMO + 'superclass: "\\u0007"\n', "superclass"),
    "templates of a text": (DEMO + "templates: a photo of a {}\n", "templates"),
    "templates of nothing": (DEMO + "templates: []\n", "templates"),
    "template without a place": (DEMO + "templates: [a photo]\n", "templates: 'a photo' must have {}"),
    "template with an attribute": (DEMO + "templates: ['{a.__class__} {}']\n", "templates"),
    "glued template": (DEMO + "templates: ['a{}s']\n", "glued"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_config_that_makes_no_sense_is_named(bench, case):
    content, says = FILES[case]
    (bench.folder / "entry.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    bench.refuse("main.py", "--base", "entry.yaml", says=says)


VALUES: dict[str, dict[str, tuple[str, ...]]] = {  # method ("": the demo) -> override -> values that make no sense
    "": {
        "learning_rate": ("0", "nan", "1e400", "many"),
        "batch_size": ("0", "1.5", "1001"),
        "flip_p": ("1.5", "nan"),
        "seed": ("-1", "1.5", str(2**70)),
        "save_every": ("0",),
        "trainer.max_steps": ("-2", "1.5"),
        "trainer.accumulate_grad_batches": ("0",),
        "trainer.devices": ("0",),
        "trainer.precision": ("12",),
        "callbacks.concept.params.every": ("0", "nan"),
        "callbacks.samples.params.every": ("0",),
        "callbacks.samples.params.steps": ("0", "100000"),
        "callbacks.samples.params.scale": ("nan",),
        "callbacks.samples.params.seed": ("-1",),
        "callbacks.samples.params.prompts": ("[]", "[a photo]", "[3]", "['{1} {}']"),
        "sd.params.image_size": ("0", "63"),
        "data.params.images.params.image_size": ("-64", "63"),
        "data.params.images.params.mask": ("some",),
        "model.params.weight_decay": ("-1", "nan"),
        "model.params.prior_weight": ("-1",),
        "model.params.gate.params.tau": ("0", "nan"),
        "model.params.gate.params.beta": ("inf",),
        "model.params.gate.params.kind": ("soft",),
        "model.params.method.params.layers": ("'['", "nowhere"),
        "weights": ("half",),
        "non_finite": ("ignore",),
        "sd.params.schedule.params.prediction_type": ("x0",),
        "model.params.method.params.attention": ("cross",),
        "ckpt": ("gone.safetensors",),
    },
    "lora": {
        "model.params.method.params.rank": ("0", "1.5"),
        "model.params.method.params.alpha": ("nan",),
        "model.params.method.params.seed": ("-1", str(2**70)),
    },
    "perfusion": {
        "model.params.method.params.token_learning_rate": ("0", "nan"),
        "model.params.method.params.momentum": ("-0.1", "1.5", "nan"),
    },
    "custom_diffusion": {"model.params.method.params.identifier": ("",)},
    "dreambooth": {
        "data.params.prior.params.count": ("0",),
        "data.params.prior.params.prompt": ("",),
        "data.params.prior.params.steps": ("0", "100000"),
        "data.params.prior.params.scale": ("nan",),
        "data.params.prior.params.seed": ("-1", str(2**70)),
        "data.params.prior.params.batch_size": ("0",),
    },
}
CASES = [(method, key, value) for method, keys in VALUES.items() for key, values in keys.items() for value in values]


@pytest.mark.parametrize(("method", "key", "value"), CASES)
def test_a_value_that_makes_no_sense_is_named(bench, method, key, value):
    files, words = [ROOT / "configs/pocket_demo.yaml"], TRAIN
    if method:
        files = [ROOT / f"configs/{file}.yaml" for file in ("backbone/pocket", "data/photos", f"method/{method}")]
        words = [*TRAIN, "superclass=dog", "trainer.precision=32-true", "callbacks.samples=null"]
    bench.refuse("main.py", "--base", *files, *words, f"{key}={value}", says=key.rpartition(".")[2])


REGULARISERS: dict[str, tuple[str, str, tuple[str, ...], str]] = {  # method, config beside it, overrides, what is said
    "no word": ("infusion", "class_semantics", (), "regularisers.class_semantics: infusion learns neither a word"),
    "no word of lora": ("lora", "fixed_norm", (), "regularisers.fixed_norm: lora learns no word"),
    "negative weight": ("lora", "l2_to_start", ("l2_to_start.params.weight=-1",), "weight: must be at least 0"),
    "share": ("lora", "output_preservation", ("output_preservation.params.empty=2",), "empty: must be from 0 to 1"),
    "pooling": ("textual_inversion", "class_semantics", ("class_semantics.params.pooling=mean",), "pooling"),
    "no contextualizer": (
        "textual_inversion",
        "diverse_context",
        (),
        "there is no contextualizer (docs/",
    ),
    "prompts without the word": (
        "textual_inversion",
        "diverse_context",
        ("diverse_context.params.prompts=FOLDER/work.txt", "diverse_context.params.contextualizer=FOLDER/work.txt"),
        "'a photo of a cat' must have {} for the concept",
    ),
}


@pytest.mark.parametrize("case", REGULARISERS)
def test_a_regulariser_that_cannot_act_is_named(bench, case):
    method, beside, overrides, says = REGULARISERS[case]
    (bench.folder / "work.txt").write_text("a photo of a cat\n")
    files = [ROOT / f"configs/{file}.yaml" for file in ("backbone/pocket", f"method/{method}", f"with/{beside}")]
    overrides = [f"model.params.regularisers.{override}" for override in overrides]
    bench.refuse(
        "main.py", "--base", *files, *TRAIN, "superclass=dog", "trainer.precision=32-true", *overrides, says=says
    )


WORDS: dict[str, tuple[list[str], str]] = {  # flags and overrides -> what is said
    "no value": (["superclass="], "superclass"),
    "no key": (["=dog"], "override `=dog`"),
    "no sign": (["superclass"], "unknown argument `superclass`"),
    "unknown key": (["superklass=dog"], "did you mean `superclass`?"),
    "unknown key within": (["trainer.max_step=1"], "did you mean `max_steps`?"),
    "open bracket": (["templates=[a {}"], "templates"),
    "index": (["templates[99]=a {}"], "templates"),
    "into a number": (["seed.x=1"], "seed"),
    "a large seed": (["--seed", str(2**70)], "seed"),
    "devices": (["--devices", "-3"], "devices"),
    "devices of a word": (["--devices", "many"], "devices"),
    "gpus": (["--gpus", "-1"], "--gpus"),
    "gpus of a word": (["--gpus", "first"], "--gpus"),
    "machines": (["--num_nodes", "0"], "num_nodes"),
    "strategy": (["--strategy", "hope"], "strategy"),
    "name with a folder": (["-n", "../../up"], "--name"),
    "unknown flag": (["--lr", "1"], "unknown argument `--lr`; a key of the config is set by lr=1"),
    "a key as a flag": (
        ["--data_root", "a"],
        "unknown argument `--data_root`; a key of the config is set by data_root=a",
    ),
    "a key with a sign as a flag": (["--data_root=a=b"], "a key of the config is set by data_root=a=b"),
    "unknown component": (["parts.vea=x"], "did you mean `vae`?"),
    "another method": (["model.params.method.target=infusion.methods.lora.LoRA"], "LoRA has no parameter `attention`"),
    "averages of nothing": (["use_ema=true", "ckpt=null"], "use_ema: there is no `ckpt`"),
    "a run to resume": (["--resume", "run"], "give one of the two"),
}


@pytest.mark.parametrize("case", WORDS)
def test_a_word_of_the_command_line_that_makes_no_sense_is_named(bench, case):
    words, says = WORDS[case]
    folder = [] if case == "name with a folder" else TRAIN[1:3]
    bench.refuse("main.py", "--base", ROOT / "configs/pocket_demo.yaml", "-t", *folder, *QUICK, *words, says=says)


def test_a_run_folder_that_is_a_file_is_named(bench):
    (bench.folder / "run").write_text("mine")
    bench.refuse("main.py", "--base", ROOT / "configs/pocket_demo.yaml", *TRAIN, says="--logdir")
