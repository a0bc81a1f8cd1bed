import pytest
import torch

from data.prompts import TEMPLATES
from infusion.attention import EditedCrossAttention
from infusion.inject import remove
from infusion.methods.infusion import Infusion
from infusion.sampling.customised import Customised
from infusion.sampling.sample import sample
from infusion.training.trainer import ConceptTrainer
from ldm.pipeline import StableDiffusion
from scripts.benchmarks.cases import CASES, NOUNS, STEPS, autocast, build_model, latents_of, random_concepts, sides
from scripts.benchmarks.measure import check_agreement, compute_dtype, describe_device, warm_up
from scripts.benchmarks.settings import GROUPS, MEMORY, RATIOS, TIMED, Settings

SETTINGS = Settings(size="pocket", latent=8, batch=2)


@pytest.fixture(scope="module")
def pocket() -> StableDiffusion:
    return build_model(SETTINGS)


def result(name: str, sd: StableDiffusion, steps: int = 1) -> torch.Tensor:
    with CASES[name](sd, SETTINGS) as run:
        return run(steps)


def plain(sd: StableDiffusion) -> bool:
    return not any(isinstance(module, EditedCrossAttention) for module in sd.unet.modules())


def test_names():
    assert set(CASES) == {*TIMED, *MEMORY} and set(STEPS) <= set(TIMED)
    for pair in RATIOS.values():
        assert any(set(pair) <= set(group) for group in GROUPS)  # measured in turn


def test_a_model_is_frozen_and_the_same_on_every_call_and_nothing_in_it_is_zero(pocket):
    again = build_model(SETTINGS).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in pocket.state_dict().items())
    assert all(parameter.any() and not parameter.requires_grad for parameter in pocket.parameters())


@pytest.mark.parametrize("precision, unet, computed", [
    ("full", torch.float32, torch.float32), ("autocast", torch.float32, torch.bfloat16),
    ("bf16", torch.bfloat16, torch.bfloat16), ("fp16", torch.float16, torch.float16),
])  # fmt: skip
def test_precisions(precision, unet, computed):
    settings = Settings(size="pocket", latent=8, precision=precision)
    sd = build_model(settings)
    assert sd.dtype == unet and next(sd.vae.parameters()).dtype == torch.float32
    assert compute_dtype(settings) == computed
    assert describe_device(settings)["dtype"] == str(computed).removeprefix("torch.")
    with autocast(sd, settings):
        assert (torch.ones(1, 1, dtype=unet) @ torch.ones(1, 1, dtype=unet)).dtype == computed
    assert check_agreement(sd, settings) < 5e-2


def test_sides_of_the_published_models():
    assert sides("pocket") == (4, 16) and sides("sd15") == (8, 64)


def test_guided_steps_are_the_samplers(pocket):
    """Base: guidance written out. With concepts: what the denoiser of the same concepts gives."""
    base = result("guided_step_base", pocket)
    latents, timesteps = latents_of(pocket, SETTINGS), torch.full((2,), 500)
    with torch.no_grad():
        empty, cat = (
            pocket.unet(latents, timesteps, pocket.text([text]).expand(2, -1, -1)) for text in ("", "a photo of a cat")
        )
        torch.testing.assert_close(base, empty + 7.5 * (cat - empty), rtol=1e-4, atol=1e-5)
    concepts, eight = random_concepts(pocket, 8), "a photo of a " + ", a ".join(f"{{{i}}}" for i in range(1, 9))
    assert tuple(concept.superclass for concept in concepts) == NOUNS
    for name, number, prompt in (("one_concept", 1, "a photo of a {1}"), ("eight_concepts", 8, eight)):
        with Customised(pocket, concepts[:number]) as customised, torch.no_grad():
            expected = customised([prompt] * 2)(latents, torch.tensor(500))
        assert torch.equal(result(f"guided_step_{name}", pocket, 2), expected)
        assert (expected - base).norm() > 1e-3 * expected.norm() and plain(pocket)


def test_the_unet_is_diffusers_and_a_changed_weight_is_noticed(pocket):
    assert result("unet_diffusers", pocket).std() > 1e-3  # nothing agrees by being zero
    assert check_agreement(pocket, SETTINGS) < 2e-5
    assert warm_up("unet", pocket, SETTINGS) == pytest.approx(warm_up("unet_diffusers", pocket, SETTINGS), rel=1e-3)
    kept = pocket.unet.out[2].bias.clone()
    ours = result("unet", pocket)
    pocket.unet.out[2].bias.add_(0.1)
    assert not torch.equal(result("unet", pocket), ours)
    pocket.unet.out[2].bias.copy_(kept)


def test_a_training_step_is_the_trainers(pocket):
    with CASES["train_step"](pocket, SETTINGS) as run:
        first, second = run(1), run(1)
    trainer = ConceptTrainer(pocket, Infusion(), "cat", TEMPLATES)
    batch = {"latents": latents_of(pocket, SETTINGS), "template": TEMPLATES[:2], "mask": None}
    expected = trainer.denoising_loss(batch, torch.Generator().manual_seed(0), {})
    remove(pocket.unet)
    assert 0 < first < expected  # the mask leaves out some of the error
    assert second < first  # the same timesteps and noise, after one step of learning
    assert plain(pocket) and all(parameter.grad is None for parameter in pocket.parameters())


def test_operations_of_training(pocket):
    stored, recomputed, ten = (
        warm_up(name, pocket, SETTINGS) for name in ("train_step", "train_step_checkpointing", "optimiser_10_steps")
    )
    assert stored < recomputed and ten == 10 * stored and not pocket.unet.checkpoint


def test_an_image_is_what_the_sampler_draws(pocket):
    concepts = random_concepts(pocket, 1)
    expected = sample(pocket, ["a photo of a {}"] * 2, concepts, steps=2, height=32, width=32)
    assert torch.equal(result("image_50_steps", pocket, 2), expected)
    assert expected.shape == (2, 3, 32, 32) and plain(pocket)


def test_a_model_is_loaded_from_a_file(pocket):
    loaded = result("load", pocket)
    for name, tensor in pocket.unet.state_dict().items():
        torch.testing.assert_close(loaded.unet.state_dict()[name], tensor.half().float())
