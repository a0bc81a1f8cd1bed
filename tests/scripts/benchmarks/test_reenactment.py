import pytest
import torch
from torch import Tensor

from data.prompts import TEMPLATES
from infusion.attention import EditedCrossAttention
from infusion.gate import Gate
from infusion.inject import remove
from infusion.methods.infusion import Infusion
from infusion.training.trainer import ConceptTrainer
from ldm.pipeline import StableDiffusion
from scripts.benchmarks.reenactment import ReleasedDesign, recomputing
from tests.infusion.conftest import random_residuals

PROMPTS = ["a photo of a {}", "image of the {} on grass"]


@pytest.fixture
def released(sd: StableDiffusion) -> ReleasedDesign:
    """With residuals that are not zero."""
    released = ReleasedDesign(sd, "cat", TEMPLATES)
    random_residuals({name: edits[0] for name, edits in released.edits.items()}, scale=10)
    return released


@pytest.fixture
def batch() -> tuple[Tensor, list[str], Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1
    return images, PROMPTS, torch.rand(2, 1, 8, 8, generator=generator), generator.manual_seed(7)


@pytest.fixture
def seen(sd: StableDiffusion) -> list[tuple]:
    """Arguments and result of each call of the UNet."""
    calls: list[tuple] = []
    sd.unet.register_forward_hook(lambda module, given, result: calls.append((*given, result)))
    return calls


def test_its_loss_is_that_of_the_trainer_with_own_attention_and_hard_gates(sd, released, batch):
    images, prompts, mask, generator = batch
    with released.ready():
        loss = released.loss(*batch)
    trainer = ConceptTrainer(sd, Infusion(attention="own"), "cat", TEMPLATES, Gate("hard"))
    with torch.no_grad():
        for name, tensor in trainer.tensors.items():
            tensor.copy_(released.tensors[name])
    cached = {"latents": sd.vae.encode(images), "template": prompts, "mask": mask}
    expected = trainer.denoising_loss(cached, generator.manual_seed(7), {})
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    trainer.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in released.tensors.items()})
    without = trainer.denoising_loss(cached, generator.manual_seed(7), {})
    assert abs(without.item() - loss.item()) > 1e-3 * loss.item()  # the residuals matter


def test_both_streams_are_rows_of_one_batch_and_the_second_half_is_the_base_model(sd, released, batch, seen):
    with released.ready():
        released.loss(*batch)
    ((latents, timesteps, context, both),) = seen
    assert len(latents) == len(timesteps) == len(context.text) == len(both) == 4
    for doubled in (latents, timesteps, context.text):
        assert torch.equal(doubled[:2], doubled[2:])
    assert both.requires_grad  # the foundation rows as well
    customised, foundation = both.detach().chunk(2)
    with torch.no_grad():
        base = sd.unet(latents[:2], timesteps[:2], context.text[:2])
    torch.testing.assert_close(foundation, base)
    assert (customised - base).norm() > 1e-2 * base.norm()


def test_every_residual_has_a_gradient_and_nothing_else(sd, released, batch):
    with released.ready():
        released.loss(*batch).backward()
        learned = {id(tensor) for tensor in released.tensors.values()}
        assert {id(p) for p in sd.parameters() if p.grad is not None} == learned
    assert all(tensor.grad.any() for tensor in released.tensors.values()) and len(learned) == 7


def test_a_step_moves_every_residual_and_encodes_images_and_prompts_anew(sd, released, batch, monkeypatch):
    counts = {"images": 0, "prompts": 0}
    encode = sd.vae.encode

    def counted(images: Tensor) -> Tensor:
        counts["images"] += len(images)
        return encode(images)

    monkeypatch.setattr(sd.vae, "encode", counted)
    sd.text.register_forward_hook(lambda module, given, result: counts.update(prompts=counts["prompts"] + len(result)))
    before = {name: tensor.detach().clone() for name, tensor in released.tensors.items()}
    with released.ready():
        first = released.step(*batch)
        released.step(*batch)
    assert counts == {"images": 4, "prompts": 4} and first.isfinite() and not first.requires_grad
    for name, tensor in released.tensors.items():
        assert (tensor.detach() - before[name]).abs().max() > 1e-3
        assert tensor.grad is None


def test_the_unet_recomputes_and_is_edited_inside_only(sd, released):
    with released.ready():
        assert sd.unet.checkpoint and any(isinstance(m, EditedCrossAttention) for m in sd.unet.modules())
    assert not sd.unet.checkpoint and not any(isinstance(m, EditedCrossAttention) for m in sd.unet.modules())
    sd.unet.checkpoint = True
    with pytest.raises(KeyError), recomputing(sd.unet, False):
        assert not sd.unet.checkpoint
        raise KeyError
    assert sd.unet.checkpoint


def test_recomputation_is_part_of_the_step(sd, released, batch):
    """With checkpointing, what the UNet does in the forward pass is done again in the backward pass."""
    calls = []
    layer = next(iter(released.edits))
    sd.unet.get_submodule(layer).to_q.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    with released.ready():
        released.loss(*batch).backward()
    assert calls == [True, True]
    remove(sd.unet)
