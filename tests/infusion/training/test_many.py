import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

import main
from data.prompts import TEMPLATES
from infusion.concepts.concept import Concept
from infusion.gate import Gate
from infusion.inject import remove
from infusion.methods.infusion import Infusion
from infusion.sampling.sample import sample
from infusion.training.many import ManyTrainer, SaveConcepts
from infusion.training.trainer import ConceptTrainer
from ldm.training import setup
from tests.infusion import conftest

ROOT = Path(__file__).parents[3]
PROMPTS = ["a photo of a {}", "the {} on a hill", "{}"]
NOUNS = {"tom": "cat", "ted": "stuffed animal", "pot": "earthenware teapot"}  # of one, two and three or more tokens
CONCEPTS = [{"name": name, "superclass": noun, "data_root": ""} for name, noun in NOUNS.items()]
STEPS = 4


def batches(name: str, count: int = 2 * STEPS, rows: int = 2) -> DataLoader:
    """A concept's own, as its data module would give them."""
    generator = torch.Generator().manual_seed(list(NOUNS).index(name))
    items = [
        {
            "latents": torch.randn(4, 8, 8, generator=generator),
            "mask": torch.rand(1, 8, 8, generator=generator),
            "template": PROMPTS[i % 3],
        }
        for i in range(count * rows)
    ]
    return DataLoader(items, batch_size=rows)


def fit(module, folder, loaders, steps=STEPS, **options) -> pl.Trainer:
    return conftest.fit(module, folder, loaders, steps, **({"accumulate_grad_batches": 2} | options))


def all_batches(names=NOUNS) -> dict[str, DataLoader]:
    return {name: batches(name) for name in names}


def randomise(module: ManyTrainer) -> None:
    with torch.no_grad():
        for bank in module.tensors.values():
            bank.copy_(torch.randn(bank.shape))


def banks(module: ManyTrainer) -> dict[str, torch.Tensor]:
    return {name: bank.detach().clone() for name, bank in module.tensors.items()}


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ({}, {}),
        ({"layers": "^output"}, {"gate": Gate("global", 0.6, 0.2), "normalise_loss": True, "weight_decay": 0.1}),
    ],
)
def test_what_is_learned_is_what_trainings_apart_learn(sd, tmp_path, method, options):
    sd.double()  # without rounding, which AdamW makes large where a gradient is nearly zero
    options = options | {"learning_rate": 0.02, "seed": 5}
    lengths = {len(sd.text.tokenizer.encode(noun)) for noun in NOUNS.values()}
    assert len(lengths) == 3
    apart, losses = {}, {}
    for name, noun in NOUNS.items():
        alone = ConceptTrainer(sd, Infusion(**method), noun, PROMPTS, **options)
        losses[name] = fit(alone, tmp_path, batches(name)).callback_metrics
        apart[name] = alone.concept()
        remove(sd.unet)
    together = ManyTrainer(sd, Infusion(**method), CONCEPTS, PROMPTS, **options)
    logged = fit(together, tmp_path, all_batches()).callback_metrics
    for name, expected in apart.items():
        concept = together.concept(name)
        assert list(concept.tensors) == list(expected.tensors)
        for layer, tensor in expected.tensors.items():
            assert tensor.abs().max() > 0.02
            torch.testing.assert_close(concept.tensors[layer], tensor, atol=1e-6, rtol=1e-5)
        assert replace(concept, date="").metadata() == replace(expected, date="").metadata()
        torch.testing.assert_close(logged[f"loss/{name}"], losses[name]["train/loss"])
    mean = sum(one["train/loss"] for one in losses.values()) / 3
    torch.testing.assert_close(logged["train/loss"], mean, atol=0, rtol=1e-5)


def test_concepts_do_not_touch_one_another(sd):
    """Neither does the gradient of one reach another's row, nor a prediction depend on another's residuals."""
    module = ManyTrainer(sd, Infusion(), CONCEPTS, PROMPTS)
    randomise(module)
    batch = {name: next(iter(loader)) for name, loader in all_batches().items()}
    losses = module.losses(batch, 0)
    losses["ted"].backward()
    for bank in module.tensors.values():
        assert not bank.grad[0].any() and bank.grad[1].any() and not bank.grad[2].any()
        with torch.no_grad():
            bank[0] += 1
    changed = module.losses(batch, 0)
    assert changed["tom"].item() != losses["tom"].item()
    assert changed["ted"].item() == losses["ted"].item() and changed["pot"].item() == losses["pot"].item()


def test_every_concept_s_gradient_is_that_of_its_own_training_whatever_the_size_of_its_batch(sd):
    sd.double()
    module = ManyTrainer(sd, Infusion(), CONCEPTS[:2], PROMPTS)
    randomise(module)
    batch = {"tom": next(iter(batches("tom", rows=3))), "ted": next(iter(batches("ted", rows=1)))}
    module.training_step(batch, 0).backward()
    for k, name in enumerate(batch):
        remove(sd.unet)
        alone = ConceptTrainer(sd, Infusion(), NOUNS[name], PROMPTS)
        with torch.no_grad():
            for layer, tensor in alone.tensors.items():
                tensor.copy_(module.tensors[layer][k])
        alone.training_step(batch[name], 0).backward()
        for layer, tensor in alone.tensors.items():
            assert tensor.grad.any()
            torch.testing.assert_close(module.tensors[layer].grad[k], tensor.grad, atol=1e-8, rtol=1e-5)


def test_the_resume_state_is_the_banks_alone_and_resumes_exactly(sd, tmp_path):
    module = ManyTrainer(sd, Infusion(), CONCEPTS, PROMPTS)
    same = {name: [next(iter(batches(name)))] * 2 * STEPS for name in NOUNS}  # a list of batches does not go on
    loaders = {name: DataLoader(items, batch_size=None) for name, items in same.items()}
    trainer = fit(module, tmp_path, loaders, 2)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert {name: tuple(bank.shape) for name, bank in saved.items()} == {
        name: (3, bank.shape[1]) for name, bank in module.tensors.items()
    }
    assert sum(bank.numel() for bank in saved.values()) == 3 * (3 * 32 + 4 * 64)
    halfway = banks(module)
    remove(sd.unet)
    resumed = ManyTrainer(sd, Infusion(), CONCEPTS, PROMPTS)
    fit(resumed, tmp_path, loaders, STEPS, ckpt_path=tmp_path / "last.ckpt")
    remove(sd.unet)
    straight = ManyTrainer(sd, Infusion(), CONCEPTS, PROMPTS)
    fit(straight, tmp_path, loaders, STEPS)
    for name, bank in straight.tensors.items():
        assert torch.equal(resumed.tensors[name], bank) and not torch.equal(halfway[name], bank)


def test_loading_is_strict(sd):
    module = ManyTrainer(sd, Infusion(), CONCEPTS, PROMPTS)
    state = {name: torch.ones_like(bank) for name, bank in module.state_dict().items()}
    module.load_state_dict(state)
    assert all((bank == 1).all() for bank in module.tensors.values())
    for odd in (
        dict(list(state.items())[1:]),
        {n: bank[:2] for n, bank in state.items()},
        state | {"x": torch.ones(3)},
    ):
        with pytest.raises(ValueError, match="the resume state does not fit: "):
            module.load_state_dict(odd, strict=False)


def test_nothing_but_the_banks_is_learned(sd, tmp_path):
    before = {name: tensor.clone() for name, tensor in sd.state_dict().items()}
    module = ManyTrainer(sd, Infusion(), CONCEPTS, PROMPTS)
    learned = [parameter for parameter in module.parameters() if parameter.requires_grad]
    assert {id(parameter) for parameter in learned} == {id(bank) for bank in module.tensors.values()}
    fit(module, tmp_path, all_batches(), 2, precision="bf16-mixed")
    assert all(bank.dtype == torch.float32 and bank.any(1).all() for bank in module.tensors.values())
    assert not any(part.training for part in sd.modules())
    remove(sd.unet)
    after = sd.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_file_for_every_concept(sd, tmp_path):
    module = ManyTrainer(sd, Infusion(), CONCEPTS, PROMPTS, seed=11)
    fit(module, tmp_path, all_batches(), 3, callbacks=[SaveConcepts(every=2)])
    files = sorted(path.relative_to(tmp_path / "models") for path in (tmp_path / "models").rglob("*.safetensors"))
    assert files == [Path(name) / f"step={i:06d}.safetensors" for name in sorted(NOUNS) for i in (2, 3)]
    for k, (name, noun) in enumerate(NOUNS.items()):
        concept = Concept.load(tmp_path / "models" / name / "step=000003.safetensors")
        assert (concept.superclass, concept.steps, concept.seed, concept.method) == (noun, 3, 11, "infusion")
        assert all(torch.equal(tensor, module.tensors[layer][k]) for layer, tensor in concept.tensors.items())


def test_a_concept_that_diverges_is_named_and_the_others_are_kept(sd, tmp_path):
    module = ManyTrainer(sd, Infusion(), CONCEPTS, PROMPTS)
    loaders = all_batches()
    for item in loaders["ted"].dataset:
        item["latents"] *= torch.inf
    with pytest.raises(ValueError, match=r"^ted: .*not finite"):
        fit(module, tmp_path, loaders, 2, callbacks=[SaveConcepts(every=1)])
    kept = [Concept.load(file) for file in (tmp_path / "models").rglob("*.safetensors")]
    assert {concept.superclass for concept in kept} == {NOUNS["tom"], NOUNS["pot"]}
    assert all(tensor.any() for concept in kept for tensor in concept.tensors.values())


def test_what_would_tie_concepts_together_is_refused(sd, tmp_path):
    with pytest.raises(ValueError, match="attention: foundation"):
        ManyTrainer(sd, Infusion("own"), CONCEPTS, PROMPTS)
    with pytest.raises(ValueError, match=r"^concepts\.ted: .*glued"):
        ManyTrainer(sd, Infusion(), CONCEPTS[1:], ["a {}s"])
    remove(sd.unet)
    module = ManyTrainer(sd, Infusion(), CONCEPTS, PROMPTS)
    with pytest.raises(ValueError, match="float32"):
        fit(module, tmp_path, all_batches(), 1, precision="bf16-true")
    remove(sd.unet)
    module = ManyTrainer(sd.float(), Infusion(), CONCEPTS, PROMPTS)
    with pytest.raises(ValueError, match=r"^trainer\.gradient_clip_val"):
        fit(module, tmp_path, all_batches(), 1, gradient_clip_val=1.0)


def test_a_batch_that_mixes_concepts_draws_what_each_draws_alone(sd):
    """Concepts of one training in one sampling batch; the images agree with separate ones, image by image."""
    module = ManyTrainer(sd, Infusion(), CONCEPTS, PROMPTS)
    randomise(module)
    concepts = [module.concept(name) for name in NOUNS]
    settings = {"steps": 3, "scale": 6.0}
    prompts = ["a photo of a {1}", "a photo of a {2}", "the {3} on a hill", "a photo of a {1}", "a photo of a dog"]
    mixed = sample(sd, prompts, concepts, seed=4, **settings)
    for i, k in enumerate((0, 1, 2, 0)):
        prompt = prompts[i].replace(f"{{{k + 1}}}", "{}")
        alone = sample(sd, [prompt], [concepts[k]], seed=4 + i, **settings)[0]
        torch.testing.assert_close(mixed[i], alone, atol=2e-5, rtol=0)
        base = sd.sample([prompt.replace("{}", concepts[k].superclass)], seed=4 + i, **settings)[0]
        assert (mixed[i] - base).abs().max() > 1e-3
    torch.testing.assert_close(mixed[4], sd.sample(prompts[4:], seed=8, **settings)[0], atol=2e-5, rtol=0)


def entry(path: Path, tiny: Path, photos: Path, lines: str) -> Path:
    common = "{max_steps: 4, precision: 32-true, accelerator: cpu, enable_progress_bar: false}"
    shutil.copyfile(tiny, path.parent / "tiny.yaml")
    path.write_text(f"{lines}\nbatch_size: 2\nseed: 9\nsave_every: 1\ntrainer: {common}\n")
    return path


def test_one_command_trains_what_a_command_for_each_trains(tiny, photos, command, tmp_path):
    nouns = {"tom": "cat", "ted": "stuffed animal"}
    listing = json.dumps([{"name": n, "superclass": w, "data_root": str(photos)} for n, w in nouns.items()])
    many = f"include: [{ROOT}/configs/infusion_many.yaml, tiny.yaml]\nconcepts: {listing}"
    many = entry(tmp_path / "many.yaml", tiny, photos, many)
    alone = f"include: [tiny.yaml, {ROOT}/configs/method/infusion.yaml, {ROOT}/configs/data/photos.yaml]"
    alone = entry(tmp_path / "alone.yaml", tiny, photos, f"{alone}\nsuperclass: ???\ndata_root: {photos}")
    alike = ("trainer.accumulate_grad_batches=2", "learning_rate=0.02")
    command("--base", many, "-t", "--logdir", tmp_path / "halted", *alike, "trainer.max_steps=2")
    command("--resume", tmp_path / "halted", "-t", "trainer.max_steps=4")
    command("--base", many, "-t", "--logdir", tmp_path / "through", *alike)
    for name, noun in nouns.items():
        run = tmp_path / f"alone-{name}"
        command("--base", alone, "-t", "--logdir", run, *alike, "callbacks.samples=null", f"superclass={noun}")
        expected = load_file(run / "models" / "step=000004.safetensors")
        resumed = load_file(tmp_path / "halted" / "models" / name / "step=000004.safetensors")
        learned = load_file(tmp_path / "through" / "models" / name / "step=000004.safetensors")
        assert learned.keys() == resumed.keys() == expected.keys()
        for layer, tensor in expected.items():
            assert tensor.any() and torch.equal(learned[layer], resumed[layer])
        runs = (tmp_path / "through" / "models" / name, run / "models")
        through, apart = (Concept.load(folder / "step=000004.safetensors") for folder in runs)
        assert through.relative_error(apart) < 1e-4


def read(name: str):
    return main.read_config(main.parse(["--base", str(ROOT / f"configs/{name}.yaml"), "--summary"]))


def test_the_summary_counts_every_concept_s_numbers():
    summary = json.loads(setup.summarise(setup.build_model(read("infusion_many"), meta=True)))
    assert summary == {"trainable_parameters": 3 * 12_480, "layers": 16, "bytes": 4 * 3 * 12_480}


def test_the_shipped_configs_have_the_recipes_of_one_concept():
    many, one = read("infusion_many"), read("infusion_cat")
    for key in ("sd", "gate", "learning_rate", "seed", "templates", "normalise_loss", "covariance"):
        assert many.model.params[key] == one.model.params[key]
    assert tuple(many.data.params.templates) == TEMPLATES
    for key in ("batch_size", "flip_p", "seed"):
        assert many.data.params[key] == one.data.params[key]
    assert many.trainer == one.trainer and many.save_every == one.save_every
    pocket, demo = read("pocket_many"), read("pocket_demo")
    assert pocket.model.params.sd == demo.model.params.sd and pocket.ckpt == demo.ckpt
    assert pocket.model.params.learning_rate == demo.model.params.learning_rate
    assert pocket.data.params.batch_size == demo.data.params.batch_size
    assert all((ROOT / concept.data_root / "mask").is_dir() for concept in pocket.data.params.concepts)
