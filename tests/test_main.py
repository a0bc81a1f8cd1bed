import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

import main
from ldm.pipeline import StableDiffusion
from ldm.training import setup
from ldm.weights.checkpoint import sha256

ROOT = Path(__file__).parents[1]
ENTRY = """
include: [tiny.yaml, ROOT/configs/method/infusion.yaml, ROOT/configs/data/photos.yaml]
superclass: cat
data_root: PHOTOS
batch_size: 2
trainer:
  max_steps: 4
  accumulate_grad_batches: 2
  accelerator: cpu
  enable_progress_bar: false
  log_every_n_steps: 1
callbacks:
  concept: {params: {every: 2}}
  samples: {params: {every: 2, steps: 2}}
save_every: 1
"""


@pytest.fixture
def entry(tiny: Path, photos: Path, tmp_path: Path) -> Path:
    path = tmp_path / "entry.yaml"
    path.write_text(ENTRY.replace("ROOT", str(ROOT)).replace("PHOTOS", str(photos)))
    shutil.copyfile(tiny, tmp_path / "tiny.yaml")
    return path


def test_summary_counts_what_is_learned_without_weights_or_photos(entry, command, capsys):
    command("--base", entry, "--summary", "ckpt=nowhere.safetensors", "data_root=nowhere")
    # four cross-attention layers of width 64: one going down, one in the middle, two going up
    assert json.loads(capsys.readouterr().out) == {"trainable_parameters": 256, "layers": 4, "bytes": 1024}


def test_a_value_left_open_matters_in_training_alone(entry, command, capsys):
    command("--base", entry, "--summary", "data_root=???")
    assert json.loads(capsys.readouterr().out)["layers"] == 4
    with pytest.raises(SystemExit):
        command("--base", entry, "data_root=???")
    assert capsys.readouterr().err == "error: data_root: not set yet; set it in the config or by data_root=…\n"


def test_without_train_nothing_is_written(entry, command, tmp_path):
    command("--base", entry, "--basedir", tmp_path / "logs")
    assert not (tmp_path / "logs").exists()


def test_a_run_folder_holds_config_concepts_resume_state_and_scalars(entry, command, tmp_path):
    command("--base", entry, "-t", "-n", "mine", "--basedir", tmp_path / "logs", "-s", "5", "learning_rate=0.02")
    (run,) = (tmp_path / "logs").glob("*_mine")
    assert sorted(path.name for path in (run / "models").iterdir()) == [
        "last.ckpt",
        "step=000002.safetensors",
        "step=000004.safetensors",
    ]
    assert sorted(path.name for path in (run / "images").iterdir()) == ["step=000002.png", "step=000004.png"]
    assert (run / "photos.png").is_file()
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [0, 1, 2, 3]
    assert len([tag for tag in events.Tags()["scalars"] if tag.startswith("share/")]) == 4
    assert events.Tags()["images"] == ["samples"]
    config = OmegaConf.load(run / "config.yaml")
    assert config.superclass == config.model.params.superclass == "cat"
    assert config.model.params.learning_rate == 0.02
    assert config.seed == config.data.params.seed == config.model.params.seed == 5
    state = torch.load(run / "models" / "last.ckpt", weights_only=True)
    assert state["global_step"] == 4
    assert sum(tensor.numel() for tensor in state["state_dict"].values()) == 256


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(entry, command, tmp_path):
    through, halted = tmp_path / "through", tmp_path / "halted"
    command("--base", entry, "-t", "--logdir", through)
    command("--base", entry, "-t", "--logdir", halted, "trainer.max_steps=2")
    before = load_file(halted / "models" / "step=000002.safetensors")
    command("--resume", halted, "-t", "trainer.max_steps=4")
    first, second = (load_file(run / "models" / "step=000004.safetensors") for run in (through, halted))
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name])
        assert not torch.equal(first[name], before[name])


def test_a_finished_run_says_how_it_goes_on(entry, command, tmp_path, caplog):
    run = tmp_path / "run"
    command("--base", entry, "-t", "--logdir", run, "trainer.max_steps=2", "callbacks.samples=null")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    caplog.set_level("INFO")
    command("--resume", run, "-t")
    assert caplog.messages[-1].startswith(f"{run}: finished at step 2; it goes on by")
    assert caplog.messages[-1].endswith(f"--resume {run} -t trainer.max_steps=4")
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_new_run_starts_from_what_another_learned(entry, command, tmp_path, caplog):
    first, second = tmp_path / "first", tmp_path / "second"
    flags = ["--base", entry, "-t", "callbacks.samples=null"]
    command(*flags, "--logdir", first, "trainer.max_steps=2")
    learned = load_file(first / "models/step=000002.safetensors")
    caplog.set_level("INFO")
    words = ["trainer.max_steps=1", "learning_rate=1e-6", f"start_from={first}", "superclass=dog"]
    command(*flags, "--logdir", second, *words)
    went_on = load_file(second / "models/step=000001.safetensors")
    for name, tensor in learned.items():
        torch.testing.assert_close(went_on[name], tensor, atol=2e-6, rtol=1e-4)
        assert not torch.equal(went_on[name], tensor) and tensor.abs().max() > 1e-3
    assert f"warning: start_from: {first} was trained as 'cat', and goes on as 'dog'" in caplog.messages
    assert f"starts from {first}, after its 2 steps" in caplog.messages


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("lora", "start_from: .*: learned by infusion, and .* is of lora"),
        ("infusion", "is in one of them only"),
    ],
)
def test_a_concept_that_a_run_cannot_start_from_is_named(tiny, tmp_path, method, says):
    from infusion.concepts.concept import Concept
    from infusion.methods.infusion import Infusion
    from infusion.methods.lora import LoRA
    from infusion.training.trainer import ConceptTrainer
    from ldm.pipeline import StableDiffusion

    sd, tensors = StableDiffusion.from_checkpoint(tiny), {"input_blocks.99": torch.ones(32)}
    Concept(tensors, "cat", ("a {}",), sd.architecture, base_hash=sd.hash).save(tmp_path / "a.safetensors")
    start = {"templates": ["a {}"], "start_from": tmp_path / "a.safetensors"}
    with pytest.raises(ValueError, match=says):
        ConceptTrainer(sd, {"lora": LoRA, "infusion": Infusion}[method](), "cat", **start)


def test_the_bar_counts_optimiser_steps_also_of_a_resumed_run(entry, command, tmp_path, capfd):
    def shown() -> list[str]:
        said = capfd.readouterr()
        for word in ("Epoch", "v_num", "Tip", "GPU available", "`Trainer.fit`"):
            assert word not in said.out + said.err
        return re.findall(r"\| (\d+/\S+) \[.*?steps/s", said.out)

    flags = ["-t", "trainer.enable_progress_bar=true", "callbacks.samples=null"]
    command("--base", entry, *flags, "--logdir", tmp_path / "run", "trainer.max_steps=2")
    assert list(dict.fromkeys(shown())) == ["0/2", "1/2", "2/2"]
    command("--resume", tmp_path / "run", *flags[:1], "trainer.enable_progress_bar=true", "trainer.max_steps=4")
    assert list(dict.fromkeys(shown())) == ["2/4", "3/4", "4/4"]


def test_tensorboard_has_the_resolved_config_among_its_hyperparameters(entry, command, tmp_path):
    command("--base", entry, "-t", "--logdir", tmp_path / "run", "trainer.max_steps=1", "callbacks.samples=null")
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    found = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    shown = metadata.parse_session_start_info_plugin_data(found).hparams
    assert shown["model.params.superclass"].string_value == "cat" and shown["data.params.seed"].number_value == 23
    metrics = metadata.parse_experiment_plugin_data(
        events.summary_metadata["_hparams_/experiment"].plugin_data.content
    ).metric_infos
    assert [metric.name.tag for metric in metrics] == ["train/loss"] and "train/loss" in events.Tags()["scalars"]
    written = OmegaConf.load(tmp_path / "run/tensorboard/hparams.yaml")
    assert written == OmegaConf.load(tmp_path / "run/config.yaml")


@pytest.mark.parametrize(
    "method",
    ["infusion", *(pytest.param(name, marks=pytest.mark.slow) for name in ("perfusion", "custom_diffusion"))],
)
def test_two_processes_learn_what_one_learns_from_the_same_batches(entry, command, tmp_path, method):
    """Two processes of batch 2 (gloo, started by Lightning's ddp) and one of batch 4, with accumulation."""
    entry.write_text(entry.read_text().replace("method/infusion", f"method/{method}"))
    flags = ["--base", entry, "-t", "callbacks.samples=null", "mask=none", "trainer.precision=32-true"]
    if method == "custom_diffusion":
        flags += [
            "data.params.prior.params.count=3",
            "data.params.prior.params.steps=1",
            f"class_root={tmp_path}/class",
        ]
    alone, both = tmp_path / "alone", tmp_path / "both"
    command(*flags, "--logdir", alone, "batch_size=4")
    words = [*flags, "--logdir", both, "--devices", "2", "--strategy", "ddp"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    program = [sys.executable, ROOT / "main.py", *words]
    done = subprocess.run([str(word) for word in program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (load_file(run / "models/step=000004.safetensors") for run in (alone, both))
    start = load_file(alone / "models/step=000002.safetensors")
    for name in first:
        learned = (first[name] - start[name]).abs().max().item()
        torch.testing.assert_close(second[name], first[name], atol=0.01 * learned, rtol=0)
        assert learned > 1e-5
    assert sorted(path.name for path in (both / "models").iterdir()) == sorted(
        path.name for path in (alone / "models").iterdir()
    )


def test_half_weights_train_what_is_in_full(entry, command, tmp_path):
    """The UNet and the text encoder in bfloat16, the residuals in float32: near what float32 learns."""
    flags = ["--base", entry, ROOT / "configs/with/small_card.yaml", "-t", "trainer.max_steps=2", "batch_size=4"]
    for name in ("float32", "bfloat16"):
        command(*flags, "--logdir", tmp_path / name, f"weights={name}", "trainer.precision=32-true")
    full, half = (load_file(tmp_path / name / "models/step=000002.safetensors") for name in ("float32", "bfloat16"))
    for name in full:
        assert half[name].dtype == torch.float32 and not torch.equal(half[name], full[name])
        assert F.cosine_similarity(half[name], full[name], dim=0) > 0.9


def test_the_seed_decides(entry, command, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        command("--base", entry, "-t", "--logdir", tmp_path / name, "-s", seed, "trainer.max_steps=2")
    a, b, c = (load_file(tmp_path / name / "models" / "step=000002.safetensors") for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not any(torch.equal(a[name], c[name]) for name in a)


def test_parts_come_from_files_of_their_own(entry, tiny, tmp_path):
    torch.manual_seed(1)
    vae = StableDiffusion.from_config(tiny).vae.state_dict()
    save_file(vae, tmp_path / "vae.safetensors")
    arguments = ["--base", str(entry), f"parts.vae={tmp_path / 'vae.safetensors'}"]
    config = main.read_config(main.parse(arguments))
    model = setup.build_model(config)
    expected = StableDiffusion.from_checkpoint(tiny)
    assert all(torch.equal(tensor, vae[name]) for name, tensor in model.sd.vae.state_dict().items())
    assert torch.equal(model.sd.unet.time_embed[0].weight, expected.unet.time_embed[0].weight)
    assert model.sd.hash != expected.hash  # another model, which concepts are to know
    assert model.sd.parts == {"vae": sha256(tmp_path / "vae.safetensors")} == model.concept().base_parts
    same = StableDiffusion.from_checkpoint(tiny, parts={"vae": tmp_path / "vae.safetensors"})
    assert same.hash == model.sd.hash == model.concept().base_hash


def test_a_used_run_folder_is_refused(entry, command, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        command("--base", entry, "-t", "--logdir", tmp_path / "run")
    assert stop.value.code == 2
    assert f"--logdir: {tmp_path / 'run'} exists already" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("flag", [["--seed", "3"], ["--name", "x"], ["--logdir", "x"]])
def test_a_resumed_run_keeps_its_own(flag, command, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command("--resume", tmp_path, *flag)
    assert f"{flag[0]}: a resumed run keeps its own" in capsys.readouterr().err


def test_a_folder_without_a_run_cannot_be_resumed(command, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command("--resume", tmp_path, "-t")
    said = f"error: --resume: {tmp_path} is not a run: it has no config.yaml; start one by --base\n"
    assert capsys.readouterr().err == said


def test_sixteen_bit_and_unmasked_photos_train_too(entry, photos, command, tmp_path):
    Image.new("I;16", (30, 30), 30000).save(photos / "3.png")
    command("--base", entry, "-t", "--logdir", tmp_path / "run", "mask=none", "trainer.max_steps=2")
    assert (tmp_path / "run" / "models" / "step=000002.safetensors").is_file()


def test_a_node_may_be_dropped_that_alone_refers_to_a_key(entry, command, tmp_path, capsys):
    """`data.params.prior=null` drops what refers to `class_root`."""
    entry.write_text(entry.read_text().replace("method/infusion", "method/dreambooth"))
    command("--base", entry, "data.params.prior=null", "callbacks.samples=null")
    with pytest.raises(SystemExit):
        command("--base", entry, "clas_root=x")
    assert capsys.readouterr().err.endswith("the config has no key `clas_root`; did you mean `class_root`?\n")


def test_a_resumed_run_keeps_its_model_data_and_seed(entry, command, tmp_path, capsys):
    command("--base", entry, "-t", "--logdir", tmp_path / "run", "trainer.max_steps=1", "callbacks.samples=null")
    for word in ("model.params.learning_rate=1", "data.params.batch_size=1", "seed=3", "superclass=dog"):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            command("--resume", tmp_path / "run", "-t", word)
        said = f"error: override `{word}`: a resumed run keeps its own model, data and seed\n"
        assert capsys.readouterr().err == said
