import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from infusion.metrics.measures.fisher import _draw
from infusion.metrics.run.protocol import CONTEXT, GROUPS
from infusion.metrics.run.stages import OUTSIDE, Group, Stages, to_regions
from infusion.sampling.sample import sample
from ldm.pipeline import StableDiffusion
from ldm.util.config import load_config
from tests.infusion.metrics.conftest import ROUNDING

ANCHORED = ("infusion", "p_plus", "perfusion", "textual_inversion")
EVERY = (*ANCHORED, "lora", "dreambooth", "custom_diffusion")


@pytest.fixture
def groups(protocol):
    return {name: Group(name, tuple(protocol.prompts(name, "cat")), "cat", 5) for name in GROUPS}


@pytest.fixture
def stages(sd, options, tools, cache):
    return Stages(sd, options, tools, cache)


def divergence(stages, groups, name, subject):
    base = stages.samples(groups[name])
    regions = stages.regions(base, "cat") if name == CONTEXT else None
    return stages.divergence(groups[name], base, subject.last, regions)


UNTRAINED = [("infusion", {}), ("textual_inversion", {}), ("p_plus", {}), ("lora", {"identifier": ""})]


@pytest.mark.parametrize("method, arguments", UNTRAINED)
def test_an_untrained_concept_is_at_zero_in_every_group(stages, groups, subject, method, arguments):
    untrained = subject(method, steps=0, **arguments)
    half = replace(stages, options=replace(stages.options, precision="autocast"))
    for name in GROUPS:
        for one in (stages, half):
            assert divergence(one, groups, name, untrained).values.abs().max() <= (ROUNDING if name == CONTEXT else 0)


def test_a_rare_word_costs_something_where_it_stands_and_only_there(stages, groups, subject):
    untrained = subject("lora", steps=0, identifier="sks")
    values = {name: divergence(stages, groups, name, untrained).values.abs().max() for name in GROUPS}
    assert values.pop(CONTEXT) > 0 and max(values.values()) == 0


@pytest.mark.parametrize("method", EVERY)
def test_a_trained_concept_changes_what_its_nature_lets_it(stages, groups, subject, method):
    """The base model's predictions are the unedited UNet's, whatever edits the customised one has."""
    before = {name: tensor.clone() for name, tensor in stages.sd.unet.state_dict().items()}
    trained = subject(method)
    for name in GROUPS:
        values = divergence(stages, groups, name, trained).values
        assert values.shape == (4, 2) and values.isfinite().all()
        assert (values.max() == 0) == (method in ANCHORED and name != CONTEXT), name
    after = stages.sd.unet.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_errors_of_weights_are_those_of_the_changed_model(stages, groups, subject):
    """By hand: one model with the base's weights, one with weights that are overwritten."""
    trained, sd = subject("dreambooth"), stages.sd
    found = divergence(stages, groups, "superclass", trained)
    latents = stages.samples(groups["superclass"])["latents"]
    text = sd.text(groups["superclass"].plain(range(4)))
    i, j = 2, 1
    t, noise = _draw(groups["superclass"].first + i, j, 2, sd.schedule.timesteps, latents.shape[1:])
    t = torch.tensor([t])
    noisy = sd.schedule.add_noise(latents[i : i + 1], noise[None], t)
    base = sd.unet(noisy, t, text[i : i + 1])
    with torch.no_grad():
        for name, parameter in sd.unet.named_parameters():
            parameter.add_(trained.concept.tensors[name])
    changed = sd.unet(noisy, t, text[i : i + 1])
    assert found.timesteps[i, j] == t
    assert found.values[i, j].item() == pytest.approx((changed - base).square().mean().item(), rel=1e-3)


def test_samples_are_the_pipelines_own(stages, groups, subject):
    group, trained = groups[CONTEXT], subject("infusion")
    settings = {"steps": 2, "scale": 2.0, "seed": 5}
    ours = stages.images(stages.samples(group, trained.last))
    plain = stages.images(stages.samples(group))
    templates = group.templates(range(4))
    torch.testing.assert_close(ours, sample(stages.sd, templates, [trained.concept], **settings), atol=1e-5, rtol=0)
    filled = [template.replace("{}", "cat") for template in templates]
    torch.testing.assert_close(plain, stages.sd.sample(filled, **settings), atol=1e-5, rtol=0)
    assert (ours - plain).abs().max() > 5e-4  # and the pipeline's agree far more closely
    assert torch.equal(stages.images(stages.samples(group), [2, 0]), plain[[2, 0]])


def test_every_setting_has_rows_of_its_own(sd, options, tools, groups, subject, cache):
    group, trained = groups[CONTEXT], subject("infusion")
    keys = [Stages(sd, options, tools, cache).samples(group, trained.last, 1).key]
    for change in ({"steps": 3}, {"scale": 3.0}, {"seed": 9}, {"sampler": "euler"}, {"beta": 0.5}, {"strength": 0.5}):
        other = replace(group, first=9) if "seed" in change else group
        keys.append(Stages(sd, replace(options, **change), tools, cache).samples(other, trained.last, 1).key)
    keys.append(Stages(sd, options, tools, cache).samples(groups["superclass"], trained.last, 1).key)
    keys.append(Stages(sd, options, tools, cache).samples(group, subject("infusion", steps=3).last, 1).key)
    assert len(set(keys)) == len(keys)
    base = [Stages(sd, replace(options, beta=beta), tools, cache).samples(group, count=1).key for beta in (0.1, 0.9)]
    assert base[0] == base[1]  # of the base model, which has no gate
    strata = [
        Stages(sd, replace(options, strata=n), tools, cache).divergence(
            group, Stages(sd, options, tools, cache).samples(group, count=1), trained.last
        )
        for n in (2, 3)
    ]
    assert [one.values.shape[1] for one in strata] == [2, 3]


def test_every_base_model_has_rows_of_its_own(tiny, options, tools, groups, tmp_path, cache):
    """The same checkpoint at another size, with another kind of prediction, and with another part."""
    save_file(StableDiffusion.from_config(tiny).unet.state_dict(), tmp_path / "unet.safetensors")
    group, found = groups["none"], []
    for word in (
        "image_size=16",
        "image_size=32",
        "schedule.params.prediction_type=v_prediction",
        "text.params.heads=1",
    ):
        sd = StableDiffusion.from_checkpoint(load_config(tiny, [f"sd.params.{word}"]))
        found.append(Stages(sd, options, tools, cache).samples(group, count=1))
    other = StableDiffusion.from_checkpoint(tiny, parts={"unet": tmp_path / "unet.safetensors"})
    found.append(Stages(other, options, tools, cache).samples(group, count=1))
    assert len({rows.key for rows in found}) == len(found)
    assert [rows["latents"].shape[-1] for rows in found] == [8, 16, 8, 8, 8]
    moved = StableDiffusion.from_checkpoint(tiny, shutil.copy(tiny.with_suffix(".safetensors"), tmp_path))
    assert Stages(moved, options, tools, cache).samples(group, count=1).key == found[0].key


def test_only_the_outside_counts_in_context(stages, groups, subject):
    trained, group = subject("infusion"), groups[CONTEXT]
    base = stages.samples(group)
    regions = stages.regions(base, "cat")
    assert regions["regions"].shape == (4, 1, 8, 8)
    assert (regions["regions"][..., :4] == 1).all() and (regions["regions"][..., 4:] == 0).all()
    outside = stages.divergence(group, base, trained.last, regions).values
    everywhere = stages.divergence(group, base, trained.last).values
    assert not torch.allclose(outside, everywhere)


def test_a_place_is_outside_where_the_mask_covers_little_of_it():
    masks = torch.zeros(2, 16, 16)
    masks[0, 2:4, 4:6], masks[0, 14:, 14:] = 0.2, torch.tensor([[0.19, 0.0], [0.0, 0.0]])
    masks[0, 8:10, 8:10] = torch.tensor([[0.2, 0.01], [0.0, 0.0]])  # hardly more than a quarter of the maximum
    regions = to_regions(masks, (8, 8))
    assert OUTSIDE == 0.25 and regions.shape == (2, 1, 8, 8) and regions[1].max() == 0
    assert regions[0, 0].nonzero().tolist() == [[1, 2], [4, 4]] and regions[0].max() == 1
