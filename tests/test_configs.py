from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import main
from data.prompts import TEMPLATES
from ldm.pipeline import StableDiffusion
from ldm.training import setup
from ldm.util.cli import UserError
from ldm.util.config import load_config

CONFIGS = Path(__file__).parents[1] / "configs"
ENTRIES = sorted(CONFIGS.glob("*.yaml"))
OF_WORDS = ("class_semantics", "diverse_context", "fixed_norm")  # which Infusion, without a word, refuses
WITH_A_WORD = "infusion.methods.infusion_word.InfusionWord"
ADDITIONS = sorted((CONFIGS / "with").glob("*.yaml"))
BACKBONES = sorted((CONFIGS / "backbone").glob("*.yaml"))
METHODS = sorted(path.stem for path in (CONFIGS / "method").glob("*.yaml") if path.stem != "concept")


def read(path: Path, *overrides: str):
    return main.read_config(main.parse(["--base", str(path), "--summary", *overrides]))


@pytest.mark.parametrize("path", ENTRIES, ids=lambda path: path.stem)
def test_every_config_builds_on_the_meta_device(path: Path):
    config = read(path)
    model = setup.build_model(config, meta=True)
    assert any(parameter.requires_grad for parameter in model.parameters())
    if "sd" in config.model.params:
        assert all(parameter.is_meta for parameter in model.sd.text.parameters())


@pytest.mark.parametrize("path", ADDITIONS, ids=lambda path: path.stem)
@pytest.mark.parametrize("entry", ["infusion_custom", "pocket_demo"])
def test_what_is_named_beside_an_entry_fits_it(path: Path, entry: str):
    arguments = ["--base", str(CONFIGS / f"{entry}.yaml"), str(path), "--summary"]
    config, alone = main.read_config(main.parse(arguments)), read(CONFIGS / f"{entry}.yaml")
    more = {"best": {"best"}, "small_card": {"offload"}}.get(path.stem, set())
    assert set(config.callbacks) == {*alone.callbacks, *more}
    if path.stem in OF_WORDS:
        with pytest.raises(UserError, match=f"regularisers.{path.stem}.*infusion learns n"):
            setup.build_model(config, meta=True)
        config = main.read_config(main.parse([*arguments, f"model.params.method={{target: {WITH_A_WORD}}}"]))
    assert any(parameter.requires_grad for parameter in setup.build_model(config, meta=True).parameters())


@pytest.mark.parametrize("path", BACKBONES, ids=lambda path: path.stem)
def test_every_backbone_builds_and_names_its_file(path: Path):
    with torch.device("meta"):
        sd = StableDiffusion.from_config(path)
    assert sd.architecture and sd.checkpoint == load_config(path).ckpt


@pytest.mark.parametrize(
    "name",
    ["infusion_custom", "infusion_custom_sd_v2", "infusion_custom_sd_v2_768", "infusion_cat", "infusion_custom_own"],
)
def test_infusion_learns_12480_numbers_in_16_layers(name: str):
    model = setup.build_model(read(CONFIGS / f"{name}.yaml"), meta=True)
    widths = sorted(p.numel() for p in model.parameters() if p.requires_grad)
    assert widths == [320] * 5 + [640] * 5 + [1280] * 6
    assert sum(widths) == 12480


@pytest.mark.parametrize(
    ("method", "numbers"),
    [
        ("infusion", 12_480), ("textual_inversion", 768), ("dreambooth", 859_520_964), ("custom_diffusion", 19_170_048),
        ("perfusion", 13_248), ("lora", 797_184), ("t_lora", 12_763_136), ("infusion_word", 13_248),
        ("p_plus", 12_288),
    ],
)  # fmt: skip
def test_numbers_that_each_method_learns_on_sd15(method: str, numbers: int):
    files = ("backbone/sd15.yaml", "data/photos.yaml", f"method/{method}.yaml")
    arguments = ["--base", *(str(CONFIGS / file) for file in files), "--summary"]
    config = main.read_config(main.parse(arguments))
    model = setup.build_model(config, meta=True)
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == numbers


@pytest.mark.parametrize("method", METHODS)
def test_a_methods_recipe_is_the_same_in_every_order_of_the_files(method: str):
    files = (CONFIGS / "backbone/sd15.yaml", CONFIGS / "data/photos.yaml", CONFIGS / f"method/{method}.yaml")
    given = ["--summary", "superclass=cat", "data_root=photos"]
    orders = [files, files[::-1], (files[2], files[0], files[1]), (files[2], files[0])]
    configs = [main.read_config(main.parse(["--base", *map(str, order), *given])) for order in orders]
    assert all(config == configs[0] for config in configs)
    assert configs[0].seed == configs[0].data.params.seed == configs[0].model.params.seed == main.Training.seed
    assert configs[0].mask == ("auto" if method in ("infusion", "infusion_word", "perfusion") else "none")
    assert configs[0].batch_size == {"dreambooth": 1, "t_lora": 1, "custom_diffusion": 8, "p_plus": 8}.get(method, 4)


def test_sdxls_recipes_for_smaller_cards_have_as_many_photos_a_step():
    """Those of docs/sdxl.md: 24, 12 and 8 GB."""
    entry, card = CONFIGS / "infusion_sdxl.yaml", str(CONFIGS / "with/small_card.yaml")
    configs = [
        read(entry),
        read(entry, "batch_size=2", "trainer.accumulate_grad_batches=8", "callbacks.samples=null"),
        read(entry, "--base", str(entry), card, "weights=bfloat16", "trainer.precision=bf16-mixed"),
    ]
    assert [config.data.params.batch_size for config in configs] == [4, 2, 1]
    for config in configs:
        assert config.data.params.batch_size * config.trainer.accumulate_grad_batches == 16
        assert (config.weights, config.trainer.precision) == ("bfloat16", "bf16-mixed")
        assert config.model.params.sd.params.unet.params.checkpoint
    assert [config.callbacks.samples is None for config in configs] == [False, True, True]
    assert list(configs[2].callbacks.offload.params.parts) == ["vae", "text"]


def test_residual_keys_double_the_numbers():
    model = setup.build_model(read(CONFIGS / "infusion_custom_own_keys.yaml"), meta=True)
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == 24960


def test_recipes_of_the_two_stable_diffusions():
    one, two = read(CONFIGS / "infusion_custom.yaml"), read(CONFIGS / "infusion_custom_sd_v2.yaml")
    assert (one.model.params.learning_rate, one.trainer.max_steps) == (0.01, 500)
    assert (two.model.params.learning_rate, two.trainer.max_steps) == (0.03, 400)
    for config in (one, two):
        assert (config.data.params.batch_size, config.trainer.accumulate_grad_batches) == (4, 4)
        assert config.data.params.flip_p == 0.5
        assert tuple(config.data.params.templates) == tuple(config.model.params.templates) == TEMPLATES
        assert config.model.params.gate.params == {"kind": "sigmoid", "beta": 0.75, "tau": 0.1}
        assert config.seed == config.data.params.seed == config.model.params.seed == 23
    assert len(TEMPLATES) == 11


def test_the_768_variant_is_the_same_recipe_on_the_model_that_predicts_v():
    small, large = read(CONFIGS / "infusion_custom_sd_v2.yaml"), read(CONFIGS / "infusion_custom_sd_v2_768.yaml")
    sd = large.model.params.sd.params
    assert (sd.name, sd.image_size, sd.schedule.params.prediction_type) == ("sd21_768", 768, "v_prediction")
    assert sd.unet.params.upcast_attention
    assert (large.data.params.images.params.image_size, large.ckpt) == (768, "ckpt/v2-1_768-ema-pruned.safetensors")
    del small.model.params.sd, large.model.params.sd, small.data.params.images, large.data.params.images
    assert (small.model, small.data, small.trainer) == (large.model, large.data, large.trainer)


@pytest.mark.parametrize("path", sorted((CONFIGS / "pocket_two").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_part_of_pocket_two_builds(path: Path, tmp_path: Path):
    """CLIPSeg stands on a CLIP from a file: here, one that was never trained."""
    overrides = []
    if path.stem == "clipseg":
        clip = setup.build_model(read(path.with_stem("clip"))).clip
        save_file(
            {name: tensor.contiguous() for name, tensor in clip.state_dict().items()}, tmp_path / "clip.safetensors"
        )
        overrides = [f"clip={tmp_path / 'clip.safetensors'}"]
    model = setup.build_model(read(path, *overrides), meta=not overrides)
    assert any(parameter.requires_grad for parameter in model.parameters())
