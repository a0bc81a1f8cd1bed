"""What every customisation method has to be true to, whatever it learns."""

from dataclasses import replace

import pytest
import torch

from infusion.concepts.concept import Concept
from infusion.deltas import TEXT, detach
from infusion.gate import Gate
from infusion.inject import remove
from infusion.methods import find_method, method_names
from infusion.methods.lora import LoRA
from infusion.methods.t_lora import T, TLoRA
from infusion.regularisers.base import Regulariser
from infusion.sampling.customised import Customised
from infusion.sampling.settings import Settings
from infusion.tokens import fill
from infusion.training.trainer import ConceptTrainer

METHODS = method_names()
TEMPLATES = ["a photo of a {}", "the {} in a box"]
STARTS_AS_BASE = [name for name in METHODS if name != "perfusion"]  # whose gate is not fully open
SMALL = {"t_lora": {"rank": 8, "min_rank": 2}}  # options that fit the small model
ANCHORED = [
    "infusion",
    "infusion_word",
    "p_plus",
    "perfusion",
    "textual_inversion",
]  # which leave prompts without the concept alone

every = pytest.mark.parametrize("name", METHODS)


def make(sd, name, **options):
    return ConceptTrainer(sd, find_method(name)(**SMALL.get(name, {})), "cat", TEMPLATES, **options)


@pytest.fixture
def batch():
    torch.manual_seed(3)
    return {"latents": torch.randn(2, 4, 8, 8), "template": TEMPLATES, "mask": torch.rand(2, 1, 8, 8)}


@pytest.fixture
def latents():
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))


def train(module, batch, steps=2):
    optimizer = module.configure_optimizers()
    for step in range(steps):
        optimizer.zero_grad()
        module.denoising_loss(batch, torch.Generator().manual_seed(step), {}).backward()
        optimizer.step()
    return module


def predict(sd, concepts, templates, latents, **options):
    """Without guidance, with the gates of training."""
    gates = {"beta": Gate().beta, "tau": Gate().tau} | options
    with torch.no_grad(), Customised(sd, concepts, Settings(scale=1.0, **gates)) as customised:
        return customised(templates)(latents, torch.tensor(400))


def base(sd, prompts, latents):
    with torch.no_grad():
        return sd.unet(latents, torch.tensor([400, 400]), sd.text(prompts))


def trained(sd, name, batch, **options):
    """A concept after two steps at a high learning rate; the base model is left as it was."""
    unet = {key: value.clone() for key, value in sd.unet.state_dict().items()}
    concept = train(make(sd, name, learning_rate=0.05), batch).concept()
    predict(sd, [concept], TEMPLATES, torch.zeros(2, 4, 8, 8))
    release(sd)
    assert {key: torch.equal(value, unet[key]) for key, value in sd.unet.state_dict().items()} == dict.fromkeys(
        unet, True
    )
    return replace(concept, **options)


def release(sd):
    """Takes off what a trainer has put into the UNet for good."""
    detach(sd.unet)
    remove(sd.unet)


@pytest.mark.parametrize("name", STARTS_AS_BASE)
def test_an_untrained_concept_is_the_base_model(sd, name, latents):
    module = make(sd, name)
    concept = module.concept()
    text, gates = module.encode(TEMPLATES)
    with torch.no_grad():
        prediction = module.predict(latents, torch.tensor([400, 400]), text, gates, {})
    release(sd)
    expected = base(sd, [fill(template, [concept.noun]) for template in TEMPLATES], latents)
    assert torch.equal(prediction, expected)
    # sampling has both streams in one batch, whose size may change the rounding
    torch.testing.assert_close(predict(sd, [concept], TEMPLATES, latents), expected, atol=1e-5, rtol=1e-5)


@every
def test_training_changes_what_is_learned_and_nothing_else(sd, name, batch):
    before = {key: value.clone() for key, value in sd.state_dict().items()}
    module = make(sd, name, learning_rate=0.05)
    start = {key: value.clone() for key, value in module.tensors.items()}
    train(module, batch)
    learned = {key for key, value in module.tensors.items() if value.requires_grad}
    moved = {key for key, value in module.tensors.items() if not torch.equal(value, start[key])}
    assert learned and learned <= moved
    assert {id(p) for p in module.parameters() if p.requires_grad} == {id(module.tensors[key]) for key in learned}
    release(sd)
    after = sd.state_dict()
    assert set(after) == set(before) and all(torch.equal(after[key], before[key]) for key in before)


@every
def test_training_and_sampling_are_the_same_model(sd, name, batch, latents):
    module = train(make(sd, name, learning_rate=0.05), batch)
    text, gates = module.encode(TEMPLATES)
    concept = module.concept()  # after encoding, which Perfusion's running mean watches
    if name == "perfusion":
        text, gates = module.encode(TEMPLATES)
        module.tensors["target_input"].data.copy_(concept.tensors["target_input"])
        gates = module.method.gates(module.gate, text.text, gates[:, 0] > 0, concept.tensors["target_input"], None)
    with torch.no_grad():
        expected = module.predict(latents, torch.tensor([400, 400]), text, gates, {})
    torch.testing.assert_close(predict(sd, [concept], TEMPLATES, latents), expected, atol=1e-5, rtol=1e-5)
    release(sd)
    torch.testing.assert_close(predict(sd, [concept], TEMPLATES, latents), expected, atol=1e-5, rtol=1e-5)
    plain = base(sd, [fill(template, [concept.noun]) for template in TEMPLATES], latents)
    assert (expected - plain).abs().max() > 1e-4


@every
def test_a_prompt_does_not_depend_on_longer_ones_beside_it(sd, name, batch, latents):
    """Prompts of 4 and 3 windows, a negative prompt of 2, and a gate that is open on every token."""
    concept = trained(sd, name, batch)
    templates = [f"{'red ' * (75 * count - 20)}{{}} on grass" for count in (4, 3)]
    options = {"scale": 3.0, "gate": "global", "negative_prompt": "blurry " * 100}
    with torch.no_grad(), Customised(sd, [concept], Settings(**options)) as customised:
        denoiser = customised(templates)
        assert denoiser.text.shape[1] == 77 * 4
        together = denoiser(latents, torch.tensor(400))
        for i, template in enumerate(templates):
            alone = customised([template])(latents[i : i + 1], torch.tensor(400))
            torch.testing.assert_close(together[i : i + 1], alone, atol=1e-4, rtol=1e-4)
            shorter = customised([template.replace("red ", "", 75)])(latents[i : i + 1], torch.tensor(400))
            assert (shorter - alone).abs().max() > 1e-3


@every
def test_strength_zero_is_the_base_model_on_the_same_words(sd, name, batch, latents):
    concept = trained(sd, name, batch)
    prompts = [fill(template, [concept.noun]) for template in TEMPLATES]
    assert torch.equal(predict(sd, [concept], TEMPLATES, latents, strength=0.0), base(sd, prompts, latents))


@every
def test_prompts_without_the_concept(sd, name, batch, latents):
    concept, prompts = trained(sd, name, batch), ["a cat in a box", "grass"]
    same = torch.equal(predict(sd, [concept], prompts, latents), base(sd, prompts, latents))
    assert same == (name in ANCHORED)


@pytest.mark.parametrize("kind", ["sigmoid", "hard", "global"])
def test_perfusion_edits_the_unconditional_rows_by_a_global_gate_alone(sd, batch, latents, kind):
    """Guidance is between two predictions of one edited UNet, each as without guidance."""
    concept = trained(sd, "perfusion", batch, gate=Gate(kind))
    settings = Settings(scale=3.0, negative_prompt="blurry", beta=Gate().beta, tau=Gate().tau)
    with torch.no_grad(), Customised(sd, [concept], settings) as customised:
        denoise = customised(TEMPLATES)
        guided, unconditional_gates = denoise(latents, torch.tensor(400)), denoise.gates[:2]
    assert unconditional_gates.any() == (kind == "global")
    conditional, unconditional = (predict(sd, [concept], words, latents) for words in (TEMPLATES, ["blurry"] * 2))
    torch.testing.assert_close(guided, unconditional + 3.0 * (conditional - unconditional), atol=1e-4, rtol=1e-4)
    assert torch.equal(unconditional, base(sd, ["blurry"] * 2, latents)) == (kind != "global")


@every
def test_a_file_brings_it_all_back(sd, name, batch, latents, tmp_path):
    concept = trained(sd, name, batch)
    concept.save(tmp_path / "concept.safetensors")
    loaded = Concept.load(tmp_path / "concept.safetensors")
    assert loaded.noun == concept.noun and dict(loaded.options) == dict(concept.options)
    assert torch.equal(predict(sd, [loaded], TEMPLATES, latents), predict(sd, [concept], TEMPLATES, latents))
    concept.save(tmp_path / "half.safetensors", "half")
    half = predict(sd, [Concept.load(tmp_path / "half.safetensors")], TEMPLATES, latents)
    torch.testing.assert_close(half, predict(sd, [concept], TEMPLATES, latents), atol=0.02, rtol=0.02)


@every
def test_a_resumed_run_learns_on(sd, name, batch):
    module = train(make(sd, name, learning_rate=0.05), batch)
    state = {key: value.clone() for key, value in module.state_dict().items()}
    release(sd)
    other = make(sd, name)
    other.load_state_dict(state)
    assert all(torch.equal(other.tensors[key], value) for key, value in state.items())
    with pytest.raises(ValueError, match="in one of them only"):
        other.load_state_dict({**state, "more": torch.zeros(1)})


@every
def test_two_concepts_of_which_one_is_silent(sd, name, batch, latents):
    concept = trained(sd, name, batch)
    other = replace(concept, tensors={key: value + 0.1 for key, value in concept.tensors.items()})
    templates = [template.replace("{}", "{1}") for template in TEMPLATES]
    both = predict(sd, [concept, other], templates, latents, strength=[1.0, 0.0])
    torch.testing.assert_close(both, predict(sd, [concept], TEMPLATES, latents), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "perfusion"])  # whose attention is its own
def test_beside_a_concept_of_infusion_that_is_silent(sd, name, batch, latents):
    other = make(sd, "infusion").concept()
    release(sd)
    concept, templates = trained(sd, name, batch), [template.replace("{}", "{1}") for template in TEMPLATES]
    both = predict(sd, [concept, other], templates, latents)
    torch.testing.assert_close(both, predict(sd, [concept], TEMPLATES, latents), atol=1e-5, rtol=1e-5)


@every
def test_a_tensor_that_has_no_place_is_refused(sd, name, batch):
    concept = trained(sd, name, batch)
    learned = (
        next(key for key in concept.tensors if key not in ("tokens", "target_input"))
        if name != ("textual_inversion")
        else "tokens"
    )
    odd = {**concept.tensors, "elsewhere.weight.up": torch.zeros(3, 3), "elsewhere.weight.down": torch.zeros(3, 3)}
    with pytest.raises(ValueError, match="elsewhere"):
        predict(sd, [replace(concept, tensors=odd)], TEMPLATES, torch.zeros(2, 4, 8, 8))
    odd = {**concept.tensors, learned: torch.zeros(5, 3)}
    with pytest.raises(ValueError, match="wide|is \\("):
        predict(sd, [replace(concept, tensors=odd)], TEMPLATES, torch.zeros(2, 4, 8, 8))


@every
def test_images_of_the_superclass_pull_towards_it(sd, name, batch):
    module = make(sd, name, prior_weight=0.5)
    prior = {"latents": torch.randn(1, 4, 8, 8), "template": ["a photo of a cat"]}
    module.log = module.log_dict = lambda *_, **__: None
    whole = module.training_step(batch | {"prior": prior}, 0)
    own = module.denoising_loss(batch, module.generator(0), {})
    alone = module.denoising_loss(prior, module.generator(0, 1), {})
    torch.testing.assert_close(whole, own + 0.5 * alone, atol=1e-4, rtol=1e-4)


class Shrunk(Regulariser):
    """Pulls what is learned to zero."""

    def term(self, sd, method, tensors, step):
        assert step.templates == TEMPLATES and step.text.shape == (2, 77, sd.text.width)
        return sum(tensor.square().sum() for tensor in tensors.values() if tensor.requires_grad)


@every
def test_a_regulariser_adds_its_term_to_the_loss_and_none_with_a_weight_of_zero(sd, name, batch):
    module = make(sd, name, regularisers={"shrunk": Shrunk(3.0), "none": None})
    module.log = module.log_dict = lambda *_, **__: None
    learned = [tensor for tensor in module.tensors.values() if tensor.requires_grad]
    with torch.no_grad():
        for tensor in learned:
            tensor.add_(0.01)
    whole = module.training_step(batch, 0)
    alone = module.denoising_loss(batch, module.generator(0), {})
    torch.testing.assert_close(whole, alone + 3.0 * sum(tensor.square().sum() for tensor in learned))
    (pulled,), (free,) = (torch.autograd.grad(loss, learned[-1:]) for loss in (whole, alone))
    torch.testing.assert_close(pulled - free, 6.0 * learned[-1], atol=1e-4, rtol=1e-3)
    module.regularisers = {"shrunk": Shrunk(0.0)}
    assert torch.equal(module.training_step(batch, 0), alone)


def test_weights_that_a_low_rank_reaches(sd, batch):
    concept = trained(sd, "lora", batch)
    method = LoRA(**concept.options)
    changes = method.differences(concept.tensors)
    assert len(changes) == 4 * 2 * 7  # self-attention and cross-attention
    for change in changes.values():
        assert torch.linalg.matrix_rank(change(torch.zeros(change.shape)), rtol=1e-4) <= 4
    with pytest.raises(ValueError, match="lacks"):
        method.differences({key: value for key, value in concept.tensors.items() if not key.endswith(".up")})


def test_perfusion_locks_its_keys_to_the_superclass(sd, batch, latents):
    """A token that is the target input exactly has, with its gate open, the superclass's key."""
    concept = trained(sd, "perfusion", batch)
    method = find_method("perfusion")()
    (put_in, removed) = method.terms(sd, concept.tensors, concept.word)
    target = concept.tensors["target_input"]
    for name, term in put_in.items():
        layer = removed[name].layer[0]
        projected = layer.to_k.weight @ target
        torch.testing.assert_close(projected + removed[name].key, torch.zeros_like(projected), atol=1e-5, rtol=1e-5)
        assert torch.equal(term.residual, concept.tensors[name])
    assert (target - method.start(sd, concept.word)["target_input"]).abs().max() > 1e-6  # the mean has moved


@pytest.mark.parametrize(
    "options", [{"rank": 0}, {"rank": "many"}, {"alpha": "much"}, {"alpha": float("nan")}, {"layers": "all"}]
)
def test_a_file_with_options_that_will_not_do_is_refused(sd, options):
    concept = make(sd, "lora").concept()
    release(sd)
    with pytest.raises(ValueError):
        Customised(sd, [replace(concept, options={**concept.options, **options})])


def test_what_the_option_names_of_lora_choose(sd):
    learned = {key: set(LoRA(**{key: value}).start(sd, None)) for key, value in
               {"rank": 4, "self_attention": False, "train_text_encoder": True}.items()}  # fmt: skip
    assert learned["self_attention"] == {name for name in learned["rank"] if ".attn2." in name}
    of_text = learned["train_text_encoder"] - learned["rank"]
    assert len(of_text) == 2 * 4 * 2 and all(name.startswith(TEXT) for name in of_text)  # two layers, A and B
    downs = [LoRA(init_lora_weights=kind).start(sd, None) for kind in ("gaussian", "uniform")]
    stds = [torch.cat([t.flatten() for n, t in down.items() if n.endswith(".down")]).std() for down in downs]
    assert 0.24 < stds[0] < 0.26 and stds[1] < 0.15


@pytest.mark.parametrize("name", ["lora", "dreambooth"])
def test_the_text_encoder_is_learned_and_put_back(sd, name, batch, latents, tmp_path):
    before = {key: value.clone() for key, value in sd.text.state_dict().items()}
    module = ConceptTrainer(sd, find_method(name)(train_text_encoder=True), "cat", TEMPLATES, learning_rate=0.05)
    train(module, batch)
    text, gates = module.encode(TEMPLATES)
    with torch.no_grad():
        expected = module.predict(latents, torch.tensor([400, 400]), text, gates, {})
    with module.unedited():
        plain = sd.text([fill(template, [module.noun]) for template in TEMPLATES])
    assert (text.text - plain).abs().max() > 1e-3
    concept = module.concept()
    release(sd)
    detach(sd.text)
    concept.save(tmp_path / "concept.safetensors")
    again = Concept.load(tmp_path / "concept.safetensors")
    torch.testing.assert_close(predict(sd, [again], TEMPLATES, latents), expected, atol=1e-5, rtol=1e-5)
    silent = predict(sd, [again], TEMPLATES, latents, strength=0.0)
    assert torch.equal(silent, base(sd, [fill(template, [concept.noun]) for template in TEMPLATES], latents))
    assert all(torch.equal(before[key], value) for key, value in sd.text.state_dict().items())


def test_the_rank_of_t_lora_falls_with_the_noise(sd, latents):
    method = TLoRA(rank=8, min_rank=2)
    assert method.ranks(torch.tensor([0, T // 2, T])).tolist() == [8, 5, 2]
    module = ConceptTrainer(sd, method, "cat", TEMPLATES)
    text, gates = module.encode(TEMPLATES)
    module.predict(latents, torch.tensor([T - 1, T - 1]), text, gates, {}).square().sum().backward()
    for name, tensor in module.tensors.items():
        if tensor.requires_grad:
            own = tensor.grad.mT if name.endswith(".up") else tensor.grad  # (r, …)
            assert own[:2].any() and not own[2:].any(), name
            module.tensors[name].data[2:] += 1.0 if not name.endswith(".up") else 0.0
    with torch.no_grad():
        quiet, noisy = (module.predict(latents, torch.tensor([t, t]), text, gates, {}) for t in (0, T - 1))
        rows = module.predict(latents, torch.tensor([0, T - 1]), text, gates, {})
        release(sd)
        plain = sd.unet(latents, torch.tensor([T - 1, T - 1]), text)
    torch.testing.assert_close(noisy, plain, atol=1e-5, rtol=1e-5)  # what was changed is masked there
    assert (quiet - sd.unet(latents, torch.tensor([0, 0]), text)).abs().max() > 1e-3
    torch.testing.assert_close(rows, torch.stack([quiet[0], noisy[1]]), atol=1e-5, rtol=1e-5)  # each row has its own


def test_the_start_of_t_lora_is_orthogonal(sd):
    start = TLoRA(rank=8, min_rank=2).start(sd, None)
    for name, tensor in start.items():
        if name.endswith((".down", ".up")):
            rows = tensor if name.endswith(".down") else tensor.mT
            torch.testing.assert_close(rows @ rows.mT, torch.eye(8), atol=1e-5, rtol=0)
    assert all(torch.equal(tensor, start[name.replace(".start", "")]) for name, tensor in start.items())


def test_the_begin_token_gives_custom_diffusion_no_gradient(sd, latents):
    """Also where blocks are recomputed in the backward pass."""
    gradients = []
    for recompute in (False, True):
        sd.unet.checkpoint = recompute
        module = make(sd, "custom_diffusion")
        text = torch.randn(2, 77, sd.text.width, generator=torch.Generator().manual_seed(0))
        text.requires_grad_()
        module.predict(latents, torch.tensor([400, 400]), text, torch.zeros(2, 0, 77), {}).square().sum().backward()
        assert not text.grad[:, 0].any() and text.grad[:, 1:].any()
        gradients.append({name: t.grad for name, t in module.tensors.items() if t.grad is not None})
        release(sd)
    assert len(gradients[0]) == 2 * 7
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
