"""The list of what can be verified without real weights: masks, gradients, what stays, what falls."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

from infusion.deltas import detach
from infusion.inject import remove
from infusion.methods import find_method
from infusion.methods.base import TOKENS
from infusion.regularisers.contextualizer import Contextualizer, load, save
from infusion.regularisers.diverse_context import DiverseContext, free_tokens, read_masked
from infusion.sampling.encode import token_ids
from infusion.training.trainer import ConceptTrainer
from ldm.util.cli import UserError

TEMPLATES = ["a photo of a {}", "the {} in a box"]


@pytest.fixture
def term(contextualizer, prompts):
    def make(**options):
        return DiverseContext(
            **{"contextualizer": str(contextualizer), "prompts": str(prompts), "weight": 0.5} | options
        )

    return make


@pytest.fixture
def batch():
    return {"latents": torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3)), "template": TEMPLATES}


def make(sd, name, term, **options):
    module = ConceptTrainer(sd, find_method(name)(**options), "cat", TEMPLATES, regularisers={"context": term})
    module.logged = {}
    module.log = lambda name, value, **_: module.logged.update({name: value})
    module.log_dict = lambda values, **_: module.logged.update(values)
    return module


def value(module, batch, number=0):
    text, _ = module.encode(TEMPLATES)
    (term,) = module.regularisers.values()
    return term.term(module.sd, module.method, module.tensors, module.step("context", batch, number, text))


def test_the_weight_is_by_method_and_the_smaller_the_larger_the_learning_rate(sd, term, batch):
    ranges = {"textual_inversion": (0.005, 1e-5, 5e-5), "p_plus": (0.0005, 2.5e-4, 2.5e-4),
              "custom_diffusion": (8e-5, 1e-4, 1e-3), "dreambooth": (5e-6, 1e-4, 1e-3)}  # fmt: skip
    for name, (rate, low, high) in ranges.items():
        options = {"train_text_encoder": True} if name == "dreambooth" else {}
        weights = []
        for factor in (1, 2):
            module = make(sd, name, term(weight=None, learning_rate=factor * rate), **options)
            weights.append(module.regularisers["context"].weight)
            remove(sd.unet)
            detach(sd)
        assert low <= weights[0] * (1 + 1e-9) and weights[0] <= high * (1 + 1e-9), name  # what the repository took
        assert weights[1] == pytest.approx(weights[0] / 2)
    module = make(sd, "textual_inversion", term(weight=0.5, learning_rate=100.0))
    value(module, batch)
    assert module.regularisers["context"].weight == 0.5 == module.logged["train/context_weight"]


@pytest.mark.parametrize(("name", "rate"), [("perfusion", 0.01), ("textual_inversion", None)])
def test_a_method_of_which_no_weight_is_known_needs_one(sd, term, name, rate):
    with pytest.raises(UserError, match=f"regularisers.context: weight: none is known for {name}"):
        make(sd, name, term(weight=None, learning_rate=rate))


def test_concept_superclass_and_frame_are_never_masked_and_the_rest_at_the_rate(sd):
    generator, counts, total = torch.Generator().manual_seed(0), 0, 0
    templates = ["a photo of a {} beside a black cat", "the {} in a box, with a bell"]
    tokens, _, concept = token_ids(sd.text, templates, ["sks cat"], [torch.zeros(1, sd.text.width)])
    labels = sd.text.tokenizer([template.replace("{}", "sks cat") for template in templates])
    free = free_tokens(sd.text.tokenizer, labels, concept[:, 0], "cat")
    said = [[sd.text.tokenizer.table.decode([i]).strip() for i in row[own].tolist()]
            for row, own in zip(labels, free, strict=True)]  # fmt: skip
    assert said == [
        ["a", "photo", "of", "a", "beside", "a", "black"],
        ["the", "in", "a", "box", ",", "with", "a", "bell"],
    ]
    for _ in range(10_000):
        masked = free & (torch.rand(free.shape, generator=generator) < 0.15)
        counts, total = counts + masked.sum(), total + free.sum()
        assert not (masked & ~free).any()
    assert abs(counts / total - 0.15) < 0.005


def test_words_that_are_not_masked_are_no_labels(sd, contextualizer):
    net = load(contextualizer, sd)
    tokens = sd.text.tokenizer(["a photo of a dog on grass"])
    masked = torch.zeros_like(tokens, dtype=torch.bool)
    masked[0, [2, 7]] = True
    loss, _ = read_masked(sd.text, net, tokens, None, tokens, masked)
    others = torch.where(masked, tokens, 5)
    assert torch.equal(read_masked(sd.text, net, tokens, None, others, masked)[0], loss)
    assert read_masked(sd.text, net, tokens, None, tokens, masked & False)[0] == 0
    logits = net(net.read(sd.text, tokens, masked, None), masked)
    expected = torch.nn.functional.cross_entropy(logits, tokens[masked])
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("name", ["textual_inversion", "custom_diffusion", "perfusion", "infusion_word"])
def test_the_word_gets_a_gradient_and_the_unet_none(sd, term, batch, name):
    module = make(sd, name, term())
    value(module, batch).backward()
    assert module.tensors[TOKENS].grad.abs().max() > 0
    assert all(tensor.grad is None for key, tensor in module.tensors.items() if key != TOKENS)
    assert sd.text.embeddings.grad is None
    net = module.regularisers["context"].contextualizer
    assert all(parameter.grad is None for parameter in net.parameters())


def test_every_word_of_p_plus_gets_a_gradient_at_the_cost_of_one(sd, term, batch):
    """Each prompt is read with one layer's word: with the same word everywhere the term is Textual Inversion's."""
    module = make(sd, "p_plus", term())
    asked, encode_tokens = [], sd.text.encode_tokens
    sd.text.encode_tokens = lambda tokens, *rest: asked.append(len(tokens)) or encode_tokens(tokens, *rest)
    own, text = module.regularisers["context"], module.encode(TEMPLATES)[0]
    loss = own.term(sd, module.method, module.tensors, module.step("context", batch, 0, text))
    loss.backward()
    assert asked == [2 * 7, 25] and all(word.grad.any() for word in module.tensors.values())
    remove(sd.unet)
    one = make(sd, "textual_inversion", term())
    expected = value(one, batch)
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-5)
    together = torch.stack([word.grad for word in module.tensors.values()]).sum(0)
    torch.testing.assert_close(together, one.tensors[TOKENS].grad, atol=1e-6, rtol=1e-4)


def test_a_step_reads_25_prompts_and_calls_no_unet(sd, term, batch):
    module = make(sd, "textual_inversion", term())
    asked, encode_tokens = [], sd.text.encode_tokens
    sd.unet.register_forward_pre_hook(lambda *_: pytest.fail("the UNet was called"))
    step = module.step("context", batch, 0, module.encode(TEMPLATES)[0])
    sd.text.encode_tokens = lambda tokens, *rest: asked.append(tokens.shape) or encode_tokens(tokens, *rest)
    module.regularisers["context"].term(sd, module.method, module.tensors, step).backward()
    assert asked == [(25, 77)]


@pytest.mark.parametrize("name", ["dreambooth", "lora"])
def test_a_text_encoder_that_is_learned_gets_the_gradient(sd, term, batch, name):
    module = make(sd, name, term(), train_text_encoder=True)
    value(module, batch).backward()
    moved = {key for key, tensor in module.tensors.items() if tensor.grad is not None and tensor.grad.any()}
    assert moved and all(key.startswith("text.") for key in moved)


@pytest.mark.parametrize("name", ["infusion", "lora", "dreambooth"])
def test_a_method_without_a_word_is_refused(sd, term, name):
    with pytest.raises(UserError, match=f"regularisers.context: {name} learns neither a word nor the text encoder"):
        make(sd, name, term())


def test_the_contextualizer_stays_and_the_two_losses_are_logged_apart(sd, term, batch):
    module = make(sd, "textual_inversion", term())
    net = module.regularisers["context"].contextualizer
    before = {name: tensor.clone() for name, tensor in (net.state_dict() | sd.text.state_dict()).items()}
    optimizer = module.configure_optimizers()
    for number in range(3):
        optimizer.zero_grad()
        module.training_step(batch, number).backward()
        optimizer.step()
    after = net.state_dict() | sd.text.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    own = module.logged["train/context"]
    assert own > 1 and 0 <= module.logged["train/context_accuracy"] <= 1
    text = module.encode(TEMPLATES)
    whole, alone = module.training_step(batch, 3), module.denoising_loss(batch, module.generator(3), {}, text)
    assert torch.equal(module.logged["train/concept"], alone) and torch.equal(module.logged["train/loss"], whole)
    torch.testing.assert_close(whole, alone + 0.5 * module.logged["train/context"])


def test_a_weight_of_zero_is_the_method_itself_bit_for_bit(sd, term, batch):
    gradients = []
    for regularisers in ({}, {"context": term(weight=0.0)}):
        module = ConceptTrainer(sd, find_method("textual_inversion")(), "cat", TEMPLATES, regularisers=regularisers)
        module.log = module.log_dict = lambda *_, **__: None
        optimizer = module.configure_optimizers()
        for number in range(3):
            optimizer.zero_grad()
            module.training_step(batch, number).backward()
            optimizer.step()
        gradients.append(module.tensors[TOKENS].detach().clone())
    assert torch.equal(*gradients)


def test_gradients_reach_a_causal_encoder_from_the_concept_on_alone(sd):
    """A mask before the concept is read without it: its gradient comes through the contextualizer."""
    row = torch.randn(1, sd.text.width, requires_grad=True)
    tokens, rows, concept = token_ids(sd.text, ["a photo on grass of a {}"], ["cat"], [row])
    states = sd.text.encode_tokens(tokens, rows)
    place = int(concept[0, 0].nonzero()[0])
    for i in range(place + 3):
        (gradient,) = torch.autograd.grad(states[0, i].sum(), row, retain_graph=True, allow_unused=True)
        reaches = gradient is not None and gradient.abs().max() > 0
        (square,) = torch.autograd.grad(states[0, i].pow(3).sum(), row, retain_graph=True)
        assert bool(square.any()) == (i >= place), (i, reaches)


def test_a_word_moves_towards_what_its_contexts_know(sd):
    """A contextualizer that has learned who eats what draws the dog's row, in sentences with fish, to the cat's."""
    torch.manual_seed(0)
    tokenizer, net = sd.text.tokenizer, Contextualizer.of(sd.text, layers=2, heads=2)
    pairs = {"cat": "fish", "dog": "meat", "bird": "seeds", "horse": "grass", "mouse": "cheese", "bear": "honey"}
    tokens = tokenizer([f"the {who} eats {what}" for who, what in pairs.items()])
    masked = torch.zeros_like(tokens, dtype=torch.bool)
    masked[:, 4] = True  # begin, the, who, eats, what
    optimizer = torch.optim.Adam(net.parameters(), 0.003)
    for _ in range(80):
        loss, accuracy = read_masked(sd.text, net, tokens, None, tokens, masked)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert accuracy == 1
    net.requires_grad_(False)
    cat, dog = (sd.text.embeddings[tokenizer.encode(word)[0]] for word in ("cat", "dog"))
    row = torch.nn.Parameter(dog[None].clone())
    ids, _, _ = token_ids(sd.text, ["the {} eats fish"], ["cat"], [row])
    optimizer, losses, cosines = torch.optim.Adam([row], 0.05 * cat.std()), [], []
    for _ in range(60):
        loss, _ = read_masked(sd.text, net, ids, row, tokens[:1], masked[:1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        cosines.append(cosine_similarity(row.detach()[0], cat, dim=0).item())
    assert losses[-1] < 0.5 * losses[0] and cosines[-1] > cosines[0] + 0.1


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("mask_probability", 0.0),
        ("mask_probability", 1.0),
        ("rows", 0),
        ("weight", -1.0),
        ("without", ["no"]),
        ("size", 0),
    ],
)
def test_arguments_out_of_range_are_refused(term, option, value):
    with pytest.raises(UserError, match=option):
        term(**{option: value})


def test_a_prompt_beyond_what_the_encoder_reads_is_refused_before_training(sd, contextualizer, tmp_path):
    (tmp_path / "long.txt").write_text("very " * 80 + "old {}\n")
    term = DiverseContext(str(contextualizer), str(tmp_path / "long.txt"), weight=0.5)
    with pytest.raises(UserError, match="long.txt.*beyond the 75 tokens"):
        make(sd, "textual_inversion", term)


def test_a_contextualizer_of_another_encoder_is_refused_by_its_name(sd, term, tmp_path):
    net = Contextualizer.of(sd.text, layers=1, heads=2)
    save(tmp_path / "other.safetensors", net, {"base_architecture": "sd15"})
    save(tmp_path / "wide.safetensors", Contextualizer(64, 100, 77), {"base_architecture": "tiny"})
    (tmp_path / "text.safetensors").write_text("no tensors")
    for name, says in (
        ("other", "'sd15'.*does not fit 'tiny'"),
        ("wide", "64 wide, 100 words"),
        ("text", ""),
        ("gone", ""),
    ):
        with pytest.raises(UserError, match=f"{name}.safetensors.*{says}"):
            make(sd, "textual_inversion", term(contextualizer=str(tmp_path / f"{name}.safetensors")))
