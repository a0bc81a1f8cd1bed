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
from scripts.benchmarks.cases import guided_steps, images, optimiser_steps, train_step, train_steps
from scripts.benchmarks.inputs import NOUNS, drawn, random_concepts, training_batch
from scripts.benchmarks.model import autocast, build_model, compute_dtype, describe_device, sides
from scripts.benchmarks.peer import check_agreement, unet_calls
from scripts.benchmarks.run import GROUPS
from scripts.benchmarks.settings import RATIOS, RATIOS_OF_MEANS, Settings
from scripts.benchmarks.timing import Case, count_flops

SETTINGS = Settings(size="pocket", latent=8, batch=2)


@pytest.fixture(scope="module")
def pocket() -> StableDiffusion:
    return build_model(SETTINGS)


def result(case: Case, steps: int = 1) -> torch.Tensor:
    with case.ready() as run:
        return run(steps)


def plain(sd: StableDiffusion) -> bool:
    return not any(isinstance(module, EditedCrossAttention) for module in sd.unet.modules())


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
    assert check_agreement(*unet_calls(sd, settings), settings) < 5e-2


def test_sides_of_the_published_models():
    assert sides("pocket") == (4, 16) and sides("sd15") == (8, 64)


def test_every_group_has_its_cases_and_every_ratio_two_of_one_group(pocket):
    for names, make in GROUPS.items():
        assert tuple(case.name for case in make(pocket, SETTINGS)) == names
        assert plain(pocket)
    for sides_ in (RATIOS | RATIOS_OF_MEANS).values():
        assert any(set(sides_) <= set(names) for names in GROUPS)


def test_guided_steps_are_the_samplers(pocket):
    """Base: guidance written out. With concepts: what the denoiser of the same concepts gives."""
    base, one, eight = guided_steps(pocket, SETTINGS)
    latents, timesteps = drawn(2, pocket, SETTINGS), torch.full((2,), 500)
    with torch.no_grad():
        empty, cat = (
            pocket.unet(latents, timesteps, pocket.text([text]).expand(2, -1, -1)) for text in ("", "a photo of a cat")
        )
        torch.testing.assert_close(result(base), empty + 7.5 * (cat - empty), rtol=1e-4, atol=1e-5)
    concepts, prompt = random_concepts(pocket, 8), "a photo of a {1}"
    for case, number in ((one, 1), (eight, 8)):
        if number == 8:
            prompt = "a photo of a " + ", a ".join(f"{{{i}}}" for i in range(1, 9))
        with Customised(pocket, concepts[:number]) as customised:
            expected = customised([prompt] * 2)(latents, torch.tensor(500))
        assert torch.equal(result(case), expected) and torch.equal(result(case, 2), expected)
        assert (expected - result(base)).norm() > 1e-3 * expected.norm()
        assert plain(pocket)


def test_concepts_have_a_word_each_and_residuals_of_their_own(pocket):
    concepts = random_concepts(pocket, 8)
    assert tuple(concept.superclass for concept in concepts) == NOUNS and len(set(NOUNS)) == 8
    first, second = (next(iter(concept.tensors.values())) for concept in concepts[:2])
    assert first.any() and not torch.equal(first, second)


def test_the_unet_is_diffusers_and_a_changed_weight_is_noticed(pocket):
    cases = unet_calls(pocket, SETTINGS)
    assert result(cases[1]).std() > 1e-3  # nothing agrees by being zero
    assert check_agreement(*cases, SETTINGS) < 2e-5
    assert count_flops(cases[0]) == pytest.approx(count_flops(cases[1]), rel=1e-3)
    bias = pocket.unet.out[2].bias
    kept = bias.clone()
    try:
        bias.add_(0.1)
        with pytest.raises(RuntimeError, match="unet and unet_diffusers differ"):
            check_agreement(*cases, SETTINGS)
    finally:
        bias.copy_(kept)


def test_a_training_step_is_the_trainers(pocket):
    case = train_step(pocket, SETTINGS, "train_step")
    first = result(case)
    trainer = ConceptTrainer(pocket, Infusion(), "cat", TEMPLATES)
    batch = training_batch(pocket, SETTINGS) | {"mask": None}
    expected = trainer.denoising_loss(batch, torch.Generator().manual_seed(0), {})
    with pytest.raises(ValueError, match="edited already"):  # the trainer of this test has its edits in the UNet
        train_step(pocket, SETTINGS, "another")
    remove(pocket.unet)
    assert 0 < first < expected  # the mask leaves out some of the error
    assert result(case) < first  # the same timesteps and noise, after one step of learning
    assert plain(pocket) and all(parameter.grad is None for parameter in pocket.parameters())


def test_operations_of_training(pocket):
    """What is recomputed counts again, and the released design does more than twice the work."""
    stored, recomputed = (
        count_flops(train_step(pocket, SETTINGS, "", checkpointing=checkpointing)) for checkpointing in (False, True)
    )
    ours, released = (count_flops(case) for case in train_steps(pocket, SETTINGS))
    (ten,) = optimiser_steps(pocket, SETTINGS)
    assert ours == stored < recomputed
    assert released > 2 * ours
    assert ten.steps == 10 and count_flops(ten) == 10 * ours


def test_an_image_is_what_the_sampler_draws(pocket):
    (case,) = images(pocket, SETTINGS)
    concepts = random_concepts(pocket, 1)
    expected = sample(pocket, ["a photo of a {}"] * 2, concepts, steps=2, scale=7.5, seed=0, height=32, width=32)
    assert case.steps == 50 and torch.equal(result(case, 2), expected)
    assert expected.shape == (2, 3, 32, 32) and plain(pocket)
