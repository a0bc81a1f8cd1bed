from dataclasses import replace

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from infusion.attention import FoundationPass
from infusion.concepts.concept import Concept
from infusion.gate import Gate, target_input
from infusion.inject import remove
from infusion.loss import masked_loss
from infusion.methods.infusion import Infusion
from infusion.sampling.customised import Customised
from infusion.sampling.sample import sample
from infusion.tokens import Word, concept_mask
from infusion.training.trainer import ConceptTrainer, SaveConcept
from ldm.diffusion.schedule import Schedule
from tests.infusion import conftest

TEMPLATES = ["a photo of a {}", "the {}"]


def make(sd, **options):
    return ConceptTrainer(sd, options.pop("method", Infusion()), "cat", TEMPLATES, **options)


def batches(count=4, rows=2, same_photo=False):
    generator = torch.Generator().manual_seed(0)
    items = [
        {
            "latents": torch.randn(4, 8, 8, generator=generator),
            "mask": torch.rand(1, 8, 8, generator=generator),
            "template": TEMPLATES[i % 2],
        }
        for i in range(count * rows)
    ]
    return DataLoader(items[:1] * len(items) if same_photo else items, batch_size=rows)


def fit(module, folder, steps, same_photo=False, **options):
    return conftest.fit(module, folder, batches(same_photo=same_photo), steps, **options)


def test_a_concept_knows_how_many_photos_a_step_has(sd, tmp_path):
    """Over accumulated batches; a bare loader says none."""
    data = pl.LightningDataModule()
    data.train_dataloader, data.batch_size = batches, 2
    module = make(sd)
    assert module.concept().batch_size == 0
    conftest.fit(module, tmp_path, data, 2, accumulate_grad_batches=2)
    assert module.concept().batch_size == 4 and module.concept().steps == 2


def residuals(module):
    return {name: parameter.detach().clone() for name, parameter in module.tensors.items()}


def test_training_moves_the_residuals_and_nothing_else(sd, tmp_path):
    before = {name: tensor.clone() for name, tensor in sd.state_dict().items()}
    module = make(sd)
    trainer = fit(module, tmp_path, 3, accumulate_grad_batches=2)
    assert all(tensor.any() for tensor in residuals(module).values())
    assert all(tensor.dtype == torch.float32 for tensor in residuals(module).values())
    shares = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("share/")}
    assert list(shares) == [f"share/{name}" for name in module.tensors]
    assert all(0 < share < 10 for share in shares.values())
    assert trainer.callback_metrics["train/loss"] > 0

    remove(sd.unet)
    after = sd.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_the_loss_is_taken_in_the_space_of_the_prediction(sd, monkeypatch):
    """With v-prediction, a model whose output is v = √ᾱ ε − √(1 − ᾱ) x_0 has no loss; one that answers ε has."""
    sd.schedule = Schedule(prediction_type="v_prediction")
    module = make(sd)
    batch = {"latents": torch.randn(2, 4, 8, 8), "template": TEMPLATES}

    def answer(kind):
        def predict(unet, noisy, timesteps, text, gates, tape):
            alphas = sd.schedule.alphas_cumprod[timesteps][:, None, None, None]
            signal, sigma = alphas.sqrt(), (1 - alphas).sqrt()
            noise = (noisy - signal * batch["latents"]) / sigma
            return signal * noise - sigma * batch["latents"] if kind == "v" else noise

        monkeypatch.setattr(module.method, "predict", predict)
        return module.training_step(batch, 0).item()

    assert answer("v") < 1e-6
    assert answer("epsilon") > 0.1


def test_residual_keys_are_trained_saved_resumed_and_sampled(sd, tmp_path):
    module = make(sd, method=Infusion("own", keys=True))
    fit(module, tmp_path, 2)
    learned = residuals(module)
    assert len(learned) == 14 and all(tensor.any() for tensor in learned.values())
    concept = module.concept()
    assert concept.numbers == 2 * sum(t.numel() for name, t in learned.items() if not name.endswith(".key"))
    concept.save(tmp_path / "cat.safetensors")
    again = Concept.load(tmp_path / "cat.safetensors")
    assert again.attention == "own" and all(torch.equal(again.tensors[name], t) for name, t in learned.items())
    remove(sd.unet)
    other = make(sd, method=Infusion("own", keys=True))
    other.load_state_dict(module.state_dict())
    assert all(torch.equal(tensor, learned[name]) for name, tensor in residuals(other).items())
    remove(sd.unet)
    images = sample(sd, ["a photo of a {}"], [again], steps=2)
    values = {name: tensor for name, tensor in again.tensors.items() if not name.endswith(".key")}
    without = sample(sd, ["a photo of a {}"], [replace(again, tensors=values)], steps=2)
    assert (images - without).abs().max() > 1e-4


def test_a_planted_residual_is_found_again(sd):
    module = make(sd, learning_rate=0.1, weight_decay=0.0)
    text, gates = module.encode(TEMPLATES)
    arguments = sd.unet, torch.randn(2, 4, 8, 8), torch.tensor([300, 900]), text, gates, {}
    with torch.no_grad():
        for parameter in module.tensors.values():
            parameter.copy_(3 * torch.randn(parameter.shape))
        target = module.method.predict(*arguments)
        for parameter in module.tensors.values():
            parameter.zero_()
    optimizer, losses = module.configure_optimizers(), []
    for _ in range(30):
        losses.append(masked_loss(module.method.predict(*arguments), target))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.1 * losses[0]


def test_checkpoint_holds_the_residuals_alone_and_resumes_exactly(sd, tmp_path):
    module = make(sd)
    trainer = fit(module, tmp_path, 3, same_photo=True)  # within an epoch
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert list(saved) == list(module.tensors)
    assert sum(tensor.numel() for tensor in saved.values()) == 3 * 32 + 4 * 64

    fit(module, tmp_path, 6, same_photo=True, ckpt_path=tmp_path / "last.ckpt")
    resumed = residuals(module)
    remove(sd.unet)
    straight = make(sd)
    fit(straight, tmp_path, 6, same_photo=True)
    for name, tensor in residuals(straight).items():
        torch.testing.assert_close(resumed[name], tensor, atol=1e-6, rtol=1e-5)


def test_loading_is_strict(sd):
    module = make(sd)
    state = {name: torch.ones_like(tensor) for name, tensor in module.state_dict().items()}
    module.load_state_dict(state)
    assert all((tensor == 1).all() for tensor in residuals(module).values())
    name = next(iter(state))
    with pytest.raises(ValueError, match="in one of them only"):
        module.load_state_dict({k: v for k, v in state.items() if k != name}, strict=False)
    with pytest.raises(ValueError, match="sd.unet.conv is in one"):
        module.load_state_dict({**state, "sd.unet.conv": torch.zeros(1)}, strict=False)
    with pytest.raises(ValueError, match=r"is \(3,\), not \(32,\)"):
        module.load_state_dict({**state, name: torch.zeros(3)})


def test_saves_concepts_on_the_way(sd, tmp_path):
    module = make(sd, gate=Gate("hard", 0.8, 0.2), learning_rate=0.02, seed=11, method=Infusion(layers="^middle"))
    fit(module, tmp_path, 5, callbacks=[SaveConcept(every=2)], accumulate_grad_batches=2)
    files = sorted((tmp_path / "models").iterdir())
    assert [file.name for file in files] == [f"step={i:06d}.safetensors" for i in (2, 4, 5)]
    concept = Concept.load(files[-1])
    assert concept.steps == 5 and concept.learning_rate == 0.02 and concept.seed == 11
    assert concept.superclass == "cat" and concept.templates == tuple(TEMPLATES)
    assert concept.gate == Gate("hard", 0.8, 0.2) and concept.architecture == "tiny" and concept.base_hash is None
    assert list(concept.tensors) == ["middle_block.1.transformer_blocks.0.attn2"]
    assert all(torch.equal(concept.tensors[name], tensor) for name, tensor in residuals(module).items())
    assert all(not torch.equal(Concept.load(files[0]).tensors[name], t) for name, t in concept.tensors.items())


def test_save_concept_wants_a_period():
    with pytest.raises(ValueError, match="every: must be at least 1"):
        SaveConcept(every=0)


def test_encoding_runs_once_for_each_template(sd):
    module = make(sd)
    prompt, mask = concept_mask(sd.text.tokenizer, "the {}", "cat")
    expected = sd.text([prompt])
    gate = Gate()(expected, mask[None], target_input(sd.text, Word("cat", tuple(TEMPLATES))))
    seen = []
    tower = sd.text.transformer["text_model"]
    tower.register_forward_pre_hook(lambda _, args, given: seen.extend(given["input_ids"]), with_kwargs=True)
    for _ in range(3):
        context, gates = module.encode(["the {}", "a photo of a {}", "the {}"])
    assert len(seen) == 4  # two for the target input, two for the batch
    assert torch.equal(context.text[0], expected[0]) and torch.equal(context.text[2], expected[0])
    assert torch.equal(gates[0], gate)


def test_shares_are_those_of_the_tape(sd):
    module = make(sd)
    with torch.no_grad():
        for parameter in module.tensors.values():
            parameter.copy_(torch.randn(parameter.shape))
    context, gates = module.encode(TEMPLATES)
    tape = {}
    foundation = context.becomes(FoundationPass, gates=gates, tape=tape)
    sd.unet(torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), foundation)
    for name, share in module.shares(tape).items():
        out, mass = tape[name]
        added = torch.einsum("bhn,hd->bnhd", mass[:, 0], module.tensors[name].view(2, -1)).flatten(2)
        expected = (added.flatten(1).norm(dim=1) / out.flatten(1).norm(dim=1)).mean()
        torch.testing.assert_close(share, expected)


def test_noise_depends_on_seed_step_and_batch(sd):
    first = make(sd, seed=1)
    draws = [torch.randn(3, generator=first.generator(i)) for i in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    remove(sd.unet)
    assert not torch.equal(torch.randn(3, generator=make(sd, seed=2).generator(0)), draws[0])


def test_images_can_be_sampled_while_training(sd):
    module = make(sd)
    latents = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        for parameter in module.tensors.values():
            parameter.copy_(torch.randn(parameter.shape))
    with Customised(sd, [module.concept()]) as customised:
        during = customised(["a {}"])(latents, torch.tensor(10))
    assert sum(parameter.requires_grad for parameter in sd.unet.parameters()) == len(module.tensors)
    remove(sd.unet)
    with Customised(sd, [module.concept()]) as customised:
        assert torch.equal(customised(["a {}"])(latents, torch.tensor(10)), during)


def test_the_base_stays_in_evaluation_mode(sd):
    module = make(sd).train()
    assert module.training and not any(part.training for part in sd.modules())


def test_half_precision_of_what_is_learned_is_an_error(sd, tmp_path):
    with pytest.raises(ValueError, match="bf16-mixed"):
        fit(make(sd), tmp_path, 1, precision="bf16-true")


def test_mixed_precision_trains(sd, tmp_path):
    module = make(sd)
    fit(module, tmp_path, 2, precision="bf16-mixed")
    assert all(tensor.dtype == torch.float32 and tensor.any() for tensor in residuals(module).values())


def test_unusable_templates_are_errors(sd):
    with pytest.raises(ValueError, match="glued"):
        ConceptTrainer(sd, Infusion(), "cat", ["a {}s"])
    with pytest.raises(ValueError, match="needs its training prompts"):
        ConceptTrainer(sd, Infusion(), "cat", [])
    with pytest.raises(ValueError, match=r"superclass: has the character '\\x07'"):  # no concept file may say it
        ConceptTrainer(sd, Infusion(), "cat\a", ["a {}"])
    with pytest.raises(ValueError, match="no {}"):
        ConceptTrainer(sd, Infusion(), "cat", ["a cat"])
