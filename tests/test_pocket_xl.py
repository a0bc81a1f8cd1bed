"""SDXL's structure at pocket size with random weights: train, save, sample, measure; every method; two words."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

import infusion
from infusion.concepts.concept import Concept
from infusion.covariance import InverseCovariance
from infusion.inject import remove
from infusion.methods import find_method, method_names
from infusion.regularisers.class_semantics import ClassSemantics
from infusion.regularisers.contextualizer import Contextualizer
from infusion.regularisers.contextualizer import save as save_contextualizer
from infusion.regularisers.diverse_context import DiverseContext
from infusion.regularisers.fixed_norm import FixedNorm
from infusion.sampling.customised import Customised
from infusion.training.many import ManyTrainer
from infusion.training.trainer import ConceptTrainer
from ldm.models.unet import UNet
from ldm.pipeline import StableDiffusion
from ldm.weights.checkpoint import save, sha256
from scripts import estimate_C_inv, metrics
from scripts import infusion_txt2img as txt2img

SMALL = ("trainer.max_steps=2", "trainer.accumulate_grad_batches=1", "trainer.accelerator=cpu", "batch_size=2")
QUIET = ("trainer.enable_progress_bar=false", "callbacks.samples=null", "superclass=cat", "flip_p=1")
FAST = ["--samples", "2", "--steps", "1", "--strata", "2", "--batch_size", "2", "--device", "cpu"]
PROTOCOL = """
concept: ["a photo of a {}", "a {} on snow"]
none: [grass]
superclass: ["a photo of a {superclass}"]
neighbours: ["a photo of a {neighbour}"]
others: [owl, bee]
"""
TEMPLATES = ["a photo of a {}", "the {} in a box"]
COUNTS, NOUNS, PLACES = ("one", "two", "three"), ("cat", "dog", "hat", "house"), ("on a hill", "outside", "at night")


@pytest.fixture(scope="module")
def config(configs) -> Path:
    return configs / "pocket_xl.yaml"


@pytest.fixture(scope="module")
def file(config, tmp_path_factory) -> Path:
    torch.manual_seed(0)
    sd = StableDiffusion.from_config(config)
    with torch.no_grad():
        for parameter in [*sd.unet.parameters(), *sd.text.parameters()]:
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    path = tmp_path_factory.mktemp("xl") / "pocket_xl.safetensors"
    save(path, dict(sd.named_children()), sd.architecture, torch.float32)
    return path


@pytest.fixture
def sd(config, file) -> StableDiffusion:
    return StableDiffusion.from_checkpoint(config, file)


def test_train_save_sample_and_measure(command, config, file, photos, sd, tmp_path, monkeypatch):
    """By SDXL's own config (bfloat16, recomputed blocks), on photos of 24 × 20 pixels whose sizes reach the UNet."""
    seen: list[Tensor | None] = []
    forward = UNet.forward

    def watched(unet: UNet, latents: Tensor, timesteps: Tensor, context: object) -> Tensor:
        seen.append(getattr(context, "sizes", None))
        return forward(unet, latents, timesteps, context)

    monkeypatch.setattr(UNet, "forward", watched)
    run = tmp_path / "run"
    entry = config.parents[1] / "infusion_sdxl.yaml"
    command("--base", entry, config, "-t", "--logdir", run, f"ckpt={file}", f"data_root={photos}", *SMALL, *QUIET)
    assert len(seen) == 4 and all(
        sizes.tolist() == [[20, 24, 0, 13, 64, 64]] * 2 for sizes in seen
    )  # of 77 × 64, to the mask

    concept = Concept.load(run / "models/step=000002.safetensors")
    assert (concept.architecture, concept.base_hash) == ("pocket_xl", sha256(file))
    widths = [tensor.numel() for tensor in concept.tensors.values()]
    assert widths == [64] * 11 and all(tensor.any() for tensor in concept.tensors.values())

    seen.clear()
    images = infusion.sample(sd, ["a photo of a {}", "a dog"], [concept], steps=2, seed=3)
    base = infusion.sample(sd, ["a photo of a cat", "a dog"], steps=2, seed=3)
    assert images.shape == (2, 3, 64, 64) and (images[0] - base[0]).abs().max() > 1e-4
    assert seen == [None] * 4  # a whole picture of its own size

    (tmp_path / "protocol.yaml").write_text(PROTOCOL)
    flags = ["--config", config, "--ckpt", file, "--personalized_ckpt", run, "--protocol", tmp_path / "protocol.yaml"]
    flags += ["--metrics", "lfd", "--clipseg", "pocket", "--out", tmp_path / "out", *FAST]
    metrics.main([str(flag) for flag in flags])
    (measured,) = json.loads((tmp_path / "out/metrics.json").read_text())["methods"].values()
    figures = {name: figure["value"] for name, figure in measured["figures"].items()}
    assert figures["lfd_none"] == figures["lfd_superclass"] == 0 < figures["lfd_context"] and measured["numbers"] == 704


def random_concept(sd: StableDiffusion, noun: str, seed: int, scale: float = 1.0) -> Concept:
    generator = torch.Generator().manual_seed(seed)
    start = find_method("infusion")().start(sd, infusion.tokens.Word(noun, tuple(TEMPLATES)))
    tensors = {name: scale * torch.randn(tensor.shape, generator=generator) for name, tensor in start.items()}
    return Concept(tensors, noun, tuple(TEMPLATES), sd.architecture, base_hash=sd.hash)


def test_images_depend_on_prompt_and_seed_alone_and_concepts_commute(sd):
    cat, dog = random_concept(sd, "cat", 1), random_concept(sd, "stuffed animal", 2)
    prompts, how = ["a {1} and a {2}", "a {2} on grass", "a house"], {"steps": 2, "height": 48, "width": 80}
    images = infusion.sample(sd, prompts, [cat, dog], seed=3, **how)
    assert images.shape == (3, 3, 48, 80)
    for i, prompt in enumerate(prompts):
        alone = infusion.sample(sd, [prompt], [cat, dog], seed=3 + i, **how)
        torch.testing.assert_close(alone[0], images[i], atol=1e-4, rtol=0)
    swapped = infusion.sample(sd, ["a {2} and a {1}"], [dog, cat], seed=3, **how)
    torch.testing.assert_close(swapped[0], images[0], atol=1e-4, rtol=0)
    base = sd.sample(["a house"], seed=5, **how)
    torch.testing.assert_close(base[0], images[2], atol=1e-5, rtol=0)
    other = infusion.sample(sd, prompts[:1], [cat, dog], seed=3, negative_prompt=" ", **how)
    assert (other[0] - images[0]).abs().max() > 1e-5  # "" is zeros, a space is an empty prompt that is encoded


def test_many_concepts_in_one_training_have_each_their_own_losses(sd):
    nouns = {"tabby": "cat", "rex": "dog"}
    batch = {
        name: {"latents": torch.randn(2, 4, 16, 16), "template": TEMPLATES, "sizes": torch.full((2, 6), 64 + 8 * k)}
        for k, name in enumerate(nouns)
    }
    entries = [{"name": name, "superclass": noun} for name, noun in nouns.items()]
    many = ManyTrainer(sd, find_method("infusion")(), entries, TEMPLATES)
    losses = many.losses(batch, 0)
    remove(sd.unet)
    for name, noun in nouns.items():
        alone = ConceptTrainer(sd, find_method("infusion")(), noun, TEMPLATES)
        torch.testing.assert_close(losses[name], alone.denoising_loss(batch[name], alone.generator(0), {}))
        plain = {key: rows for key, rows in batch[name].items() if key != "sizes"}
        assert (losses[name] - alone.denoising_loss(plain, alone.generator(0), {})).abs() > 1e-6
        remove(sd.unet)


@pytest.mark.parametrize("name", method_names())
def test_every_method_trains_and_samples_what_it_trained(sd, name):
    """The gradients reach everything that is learned, and sampling predicts what training does."""
    options = {"rank": 4, "min_rank": 2} if name == "t_lora" else {}
    trainer = ConceptTrainer(sd, find_method(name)(**options), "cat", TEMPLATES, learning_rate=0.05)
    generator = torch.Generator().manual_seed(0)
    batch = {"latents": torch.randn(2, 4, 16, 16, generator=generator), "template": TEMPLATES}
    batch["sizes"] = torch.tensor([[900, 600, 8, 0, 64, 64], [64, 64, 0, 0, 64, 64]])
    optimiser = trainer.configure_optimizers()
    for step in range(2):
        optimiser.zero_grad()
        trainer.denoising_loss(batch, torch.Generator().manual_seed(step), {}).backward()
        optimiser.step()
    learned = [tensor for tensor in trainer.tensors.values() if tensor.requires_grad]
    assert all(tensor.grad.any() for tensor in learned if name != "lora")  # of A there is none while B is zero
    context, gates = trainer.encode(TEMPLATES)
    if name == "perfusion":  # its running mean watches every encoding
        mask = gates[:, 0] > 0
        target = trainer.method.target(sd, trainer.tensors, trainer.word)
        gates = trainer.method.gates(trainer.gate, sd.text.comparable(context.text), mask, target, None)
    latents, timesteps = batch["latents"], torch.tensor([400, 400])
    with torch.no_grad():
        expected = trainer.predict(latents, timesteps, context, gates, {})
    concept, at_one = trainer.concept(), infusion.Settings(scale=1.0, beta=0.75, tau=0.1)
    with Customised(sd, [concept], at_one) as customised:
        torch.testing.assert_close(customised(TEMPLATES)(latents, timesteps), expected, atol=1e-4, rtol=1e-4)


def test_a_learned_word_has_a_row_for_each_encoder(sd):
    trainer = ConceptTrainer(sd, find_method("textual_inversion")(), "stuffed animal", TEMPLATES)
    tokens = trainer.tensors["tokens"]
    words = len(sd.text.tokenizer.encode("stuffed animal"))
    assert tokens.shape == (words, 16 + 24)  # 768 + 1280 on SDXL
    context, _ = trainer.encode(TEMPLATES)
    for part in (context.text[..., :16], context.text[..., 16:], context.pooled):
        (gradient,) = torch.autograd.grad(part.square().sum(), tokens, retain_graph=True)
        first, second = gradient.split([16, 24], 1)
        expected = (True, False) if part.shape[-1] == 16 else (False, True)
        assert (bool(first.any()), bool(second.any())) == expected
    assert torch.equal(trainer.concept().tensors["tokens"], tokens)


@pytest.mark.parametrize("name", ["textual_inversion", "p_plus"])
def test_regularisers_of_a_word_act_in_both_encoders(sd, name, tmp_path):
    torch.manual_seed(0)
    facts = {"base_architecture": "pocket_xl", "base_sha256": sd.digests["text"]}
    save_contextualizer(tmp_path / "c.safetensors", Contextualizer.of(sd.text), facts)
    (tmp_path / "prompts.txt").write_text("a {} on snow, with a hat\n")
    context = DiverseContext(str(tmp_path / "c.safetensors"), str(tmp_path / "prompts.txt"), weight=1.0)
    terms = {"norm": FixedNorm(1.0), "context": context, "semantics": ClassSemantics()}
    trainer = ConceptTrainer(sd, find_method(name)(), "cat", TEMPLATES, regularisers=terms)
    trainer.log = trainer.log_dict = lambda *_, **__: None
    words = list(trainer.tensors.values())
    usual = sd.text.embed(torch.arange(sd.text.vocab_size))
    for part, every in zip(words[0].split([16, 24], 1), usual.split([16, 24], 1), strict=True):
        torch.testing.assert_close(part.norm(dim=1), every.norm(dim=1).mean()[None])
    batch = {"latents": torch.zeros(2, 4, 16, 16), "template": TEMPLATES}
    with torch.no_grad():
        for word in words:
            word.add_(torch.randn_like(word), alpha=0.1)
    for key, term in terms.items():
        step = trainer.step(key, batch, 0, trainer.encode(TEMPLATES)[0])
        gradients = torch.autograd.grad(term.term(sd, trainer.method, trainer.tensors, step), words)
        assert all(part.any() for gradient in gradients for part in gradient.split([16, 24], 1)), key


def test_the_gate_opens_at_the_concepts_word_alone(sd):
    concept = random_concept(sd, "cat", 1)
    with Customised(sd, [concept], infusion.Settings(scale=5.0)) as customised:
        context, gates = customised.encode(["a {} on a hill", "a dog"])
    assert context.text.shape == (4, 32, 40) and context.pooled.shape == (4, 24) and gates.shape == (4, 1, 32)
    assert not context.text[:2].any() and not context.pooled[:2].any()  # no negative prompt
    assert gates[2, 0, 2] > 0.5 and gates.count_nonzero() == 1


def test_full_size_is_not_needed_for_the_numbers(configs: Path, command: Callable[..., None], capsys):
    command("--base", configs.parent / "infusion_sdxl.yaml", "--summary")
    assert json.loads(capsys.readouterr().out) == {"trainable_parameters": 83_200, "layers": 70, "bytes": 332_800}


def test_the_other_commands_take_it(command, config, file, photos, tmp_path):
    """A covariance of both encoders' text, two concepts in one training, regions, and a picture that is drawn again."""

    def run(script: Callable[[list[str]], None], *said: object) -> None:
        script([str(word) for word in said])

    captions, inverse, logs = tmp_path / "captions.txt", tmp_path / "inverse.safetensors", tmp_path / "run"
    captions.write_text("\n".join(f"{count} {noun}s {place}" for count in COUNTS for noun in NOUNS for place in PLACES))
    base = ["--config", config, "--ckpt", file, "--device", "cpu"]
    run(estimate_C_inv.main, "--caption", captions, "--save_path", inverse, *base)
    matrix = InverseCovariance(inverse).matrix
    assert matrix.shape == (40, 40) and torch.linalg.eigvalsh(matrix.double()).min() > 0

    listed = [f"{{name: {name}, superclass: {name}, data_root: {photos}}}" for name in ("cat", "dog")]
    given = [f"concepts=[{','.join(listed)}]", f"ckpt={file}", f"covariance={inverse}", *SMALL, *QUIET[:1]]
    command("--base", config.parents[1] / "infusion_many_sdxl.yaml", config, "-t", "--logdir", logs, *given)
    files = sorted(logs.glob("models/**/*.safetensors"))
    assert [Concept.load(path).superclass for path in files] == ["cat", "dog"]

    concepts = ",".join(map(str, files))
    said = ["--personalized_ckpt", concepts, "--region", "1:0,0,0.5,1", "2:0.5,0,1,1", "--covariance", inverse, *base]
    first, again = tmp_path / "first/samples/00000.png", tmp_path / "again/samples/00000.png"
    run(txt2img.main, "--prompt", "a {1} and a {2}", *said, "--ddim_steps", 2, "--outdir", tmp_path / "first")
    run(txt2img.main, "--from-png", first, "--outdir", tmp_path / "again", "--device", "cpu")
    pictures = [pil_to_tensor(Image.open(path)).int() for path in (first, again)]
    assert (pictures[0] - pictures[1]).abs().max() <= 2  # of 255
