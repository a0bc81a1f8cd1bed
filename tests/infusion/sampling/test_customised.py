import warnings
from dataclasses import replace

import pytest
import torch

from infusion.attention import key_name
from infusion.concepts.concept import Concept
from infusion.gate import Gate, target_input
from infusion.inject import cross_attention_layers
from infusion.sampling.customised import Customised
from infusion.sampling.regions import Region
from infusion.sampling.settings import Settings
from infusion.tokens import Word, concept_mask
from ldm.models.attention import Context
from tests.infusion.test_attention import reference

TEMPLATES = ("a photo of a {}", "the {}")
T = torch.tensor(500)


def make_concept(sd, superclass="cat", scale=1.0, seed=0, **fields):
    torch.manual_seed(seed)
    layers = cross_attention_layers(sd.unet)
    tensors = {name: scale * torch.randn(layer.heads * layer.dim_head) for name, layer in layers.items()}
    return Concept(tensors, superclass, TEMPLATES, sd.architecture, **fields)


def denoise(sd, concepts, prompts, latents, map_grid=None, **settings):
    with Customised(sd, concepts, Settings(**settings)) as customised:
        return customised(prompts, map_grid)(latents, T)


@pytest.fixture
def latents():
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))


PROMPTS = ["a photo of a {} outside", "{} in the rain"]


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("scale", [1, 6.0])
def test_is_guidance_towards_the_two_stream_definition(sd, latents, scale, own):
    concept = make_concept(sd, "stuffed animal", attention="own" if own else "foundation")
    settings = {"negative_prompt": "blurry", "scale": scale, "beta": 0.6, "tau": 0.2, "strength": 0.8}
    result = denoise(sd, [concept], PROMPTS, latents, **settings)

    prompts, masks = zip(*(concept_mask(sd.text.tokenizer, p, "stuffed animal") for p in PROMPTS), strict=True)
    text, timesteps = sd.text(list(prompts)), T.expand(2)
    gates = Gate("sigmoid", 0.6, 0.2)(
        text, torch.stack(masks), target_input(sd.text, Word("stuffed animal", TEMPLATES))
    )
    residuals = {name: [0.8 * tensor] for name, tensor in concept.tensors.items()}
    _, customised, _ = reference(sd.unet, residuals, latents, timesteps, text, gates[:, None], own)
    unconditional = sd.unet(latents, timesteps, sd.text(["blurry"] * 2))
    torch.testing.assert_close(result, unconditional + scale * (customised - unconditional), atol=1e-4, rtol=1e-4)


def test_a_concept_of_zeros_is_the_base(sd, latents):
    result = denoise(sd, [make_concept(sd, scale=0)], PROMPTS, latents)
    prompts = [prompt.format("cat") for prompt in PROMPTS]
    expected = sd.guided(prompts)(latents, T)
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("map_grid", [None, (4, 4)])
def test_a_strength_of_zero_is_the_base_to_the_bit(sd, latents, own, map_grid):
    concepts = [make_concept(sd, attention="own" if own else "foundation")]
    prompts = [prompt.format("cat") for prompt in PROMPTS]
    expected = sd.guided(prompts)(latents, T)
    none = denoise(sd, concepts, PROMPTS, latents, strength=0, map_grid=map_grid)
    assert torch.equal(none, expected)
    both = denoise(sd, concepts * 2, ["a photo of a {1} outside", "{2} in the rain"], latents, strength=[0, 1])
    assert torch.equal(both[0], expected[0]) and not torch.equal(both[1], expected[1])


@pytest.mark.parametrize("own", [False, True])
def test_strength_is_continuous(sd, latents, own):
    concepts = [make_concept(sd, attention="own" if own else "foundation")]
    at = {s: denoise(sd, concepts, PROMPTS, latents, scale=1, strength=s) for s in (0.0, 1e-3, 0.5, 0.501, 1.0)}
    whole = (at[1.0] - at[0.0]).norm()
    assert (at[1e-3] - at[0.0]).norm() < 0.01 * whole and (at[0.501] - at[0.5]).norm() < 0.01 * whole
    assert (at[0.5] - at[0.0]).norm() > 0.1 * whole


@pytest.mark.parametrize("scale", [1, 7.5])
def test_prompts_without_the_concept_are_the_base_to_the_bit(sd, latents, scale):
    prompts = ["a photo of a dog", "a cat"]
    result = denoise(sd, [make_concept(sd)], prompts, latents, scale=scale)
    assert torch.equal(result, sd.guided(prompts, scale=scale)(latents, T))


def test_an_image_does_not_depend_on_its_neighbours(sd, latents):
    concept = make_concept(sd)
    mixed = denoise(sd, [concept], ["a dog", "a {}"], latents)
    torch.testing.assert_close(mixed[:1], denoise(sd, [concept], ["a dog"], latents[:1]), atol=1e-4, rtol=0)
    torch.testing.assert_close(mixed[1:], denoise(sd, [concept], ["a {}"], latents[1:]), atol=1e-4, rtol=0)


def test_one_call_with_three_rows_per_image(sd, latents):
    calls = []
    sd.unet.register_forward_pre_hook(lambda module, args: calls.append((type(args[2]).__name__, len(args[0]))))
    denoise(sd, [make_concept(sd)], ["a {}", "a dog"], latents)
    denoise(sd, [make_concept(sd)], ["a {}", "{}"], latents, scale=1)
    denoise(sd, [make_concept(sd, attention="own")], ["a {}", "{}"], latents)
    denoise(sd, [make_concept(sd)], ["a dog", "a cow"], latents)
    assert calls == [("StackedPass", 5), ("StackedPass", 4), ("OwnPass", 4), ("Context", 4)]


def test_several_concepts_commute_and_have_their_own_blending(sd, latents):
    cat, dog = make_concept(sd, "cat", seed=1), make_concept(sd, "stuffed animal", seed=2)
    prompts, swapped = ["a {1} and a {2}", "a {2}"], ["a {2} and a {1}", "a {1}"]
    first = denoise(sd, [cat, dog], prompts, latents, beta=[0.6, 0.9], tau=0.1, strength=[1, 0.5])
    second = denoise(sd, [dog, cat], swapped, latents, beta=[0.9, 0.6], tau=0.1, strength=[0.5, 1])
    torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)
    alone = denoise(sd, [cat], ["a {1} and a stuffed animal", "a stuffed animal"], latents, beta=0.6, tau=0.1)
    silent = denoise(sd, [cat, dog], prompts, latents, beta=0.6, tau=0.1, strength=[1, 0])
    torch.testing.assert_close(silent, alone, atol=1e-4, rtol=1e-4)


def test_each_concept_has_its_kind_of_gate(sd, latents):
    cat, dog = make_concept(sd, "cat", seed=1), make_concept(sd, "dog", seed=2)
    prompts = ["a {1} and a {2}"] * 2
    gates = Customised(sd, [cat, dog], Settings(gate=["hard", "global"], beta=0.8))(prompts).gates[2:]
    assert set(gates[0, 0].tolist()) == {0.0, 1.0} and gates[0, 0].sum() == 1 and (gates[:, 1] > 0).all()
    own = Customised(sd, [cat, dog], Settings(beta=0.8))(prompts).gates[2:]
    assert ((own > 0).sum(2) == 1).all()
    token = own[0, 1].argmax()
    torch.testing.assert_close(gates[0, 1, token], own[0, 1, token])
    hard = make_concept(sd, "cat", seed=1, gate=Gate("hard"))
    torch.testing.assert_close(
        denoise(sd, [hard], ["a {}", "the {}"], latents), denoise(sd, [cat], ["a {}", "the {}"], latents, gate="hard")
    )


def test_another_word_may_stand_for_the_concept(sd, latents):
    cat = make_concept(sd)
    said = denoise(sd, [cat], ["a {} outside", "my {}"], latents, noun=["big kitten"])
    denoiser = Customised(sd, [cat], Settings(noun=["big kitten"]))(["a {} outside", "my {}"])
    torch.testing.assert_close(denoiser.text[2:], sd.text(["a big kitten outside", "my big kitten"]))
    assert ((denoiser.gates[2:] > 0).sum(2) == 2).all()  # on both tokens of it
    assert (said - denoise(sd, [cat], ["a {} outside", "my {}"], latents)).abs().max() > 1e-3


def test_a_region_over_everything_changes_nothing_and_another_does(sd, latents):
    concept, options = make_concept(sd), {"scale": 3.0}
    free = denoise(sd, [concept], PROMPTS, latents, **options)
    whole = denoise(sd, [concept], PROMPTS, latents, region=[Region(1, 0, 0, 1, 1)], **options)
    halves = [Region(1, 0, 0, 0.5, 1), Region(1, 0.5, 0, 1, 1)]
    torch.testing.assert_close(whole, free)
    torch.testing.assert_close(denoise(sd, [concept], PROMPTS, latents, region=halves, **options), free)
    assert (denoise(sd, [concept], PROMPTS, latents, region=halves[:1], **options) - free).abs().max() > 1e-3


def test_eight_concepts_are_the_sum_of_their_residuals(sd, latents):
    """With one gate on one token, the edits of all concepts at it add up to that of one concept."""
    concepts = [make_concept(sd, "cat", 0.3, seed) for seed in range(8)]
    together = {name: sum(concept.tensors[name] for concept in concepts) for name in concepts[0].tensors}
    names = "".join(f"{{{i}}} " for i in range(1, 9))
    one = Concept(together, "cat", TEMPLATES, sd.architecture)
    options = {"gate": "hard", "noun": ["cat"]}
    cat = "cat " * 8
    gates = Customised(sd, concepts, Settings(**options))([names, names]).gates[2:]
    assert gates.sum((1, 2)).tolist() == [8, 8]
    assert (gates[0].sum(0) <= 1).all()  # each at an occurrence of its own
    many = denoise(sd, concepts, ["{1}"] * 2, latents, strength=[1] + [0] * 7, **options)
    torch.testing.assert_close(many, denoise(sd, concepts[:1], ["{}"] * 2, latents, **options), atol=1e-5, rtol=1e-5)
    everywhere = {"gate": "global", "noun": ["cat"]}
    torch.testing.assert_close(
        denoise(sd, concepts, [names, cat], latents, **everywhere),
        denoise(sd, [one], ["{} " * 8, cat], latents, **everywhere), atol=1e-3, rtol=1e-3,
    )  # fmt: skip


def test_concepts_with_residual_keys(sd, latents):
    plain = make_concept(sd, attention="own")
    zero = {key_name(name): torch.zeros_like(tensor) for name, tensor in plain.tensors.items()}
    keys = {name: torch.randn_like(tensor) for name, tensor in zero.items()}
    with_zero = make_concept(sd, attention="own")
    same = denoise(sd, [replace(with_zero, tensors=plain.tensors | zero)], PROMPTS, latents)
    torch.testing.assert_close(same, denoise(sd, [plain], PROMPTS, latents), atol=1e-5, rtol=1e-5)
    other = denoise(sd, [replace(with_zero, tensors=plain.tensors | keys)], PROMPTS, latents)
    assert (other - same).abs().max() > 1e-2
    torch.testing.assert_close(
        denoise(sd, [replace(plain, tensors=plain.tensors | keys), plain], ["{1} {2}"] * 2, latents, strength=[1, 0]),
        denoise(sd, [replace(plain, tensors=plain.tensors | keys)], ["{} cat"] * 2, latents), atol=1e-4, rtol=1e-4,
    )  # fmt: skip
    with pytest.raises(ValueError, match="residual keys change an attention map"):
        Customised(sd, [make_concept(sd), replace(make_concept(sd), tensors=keys)])


def test_a_concept_may_cover_some_of_the_layers(sd, latents):
    whole = make_concept(sd)
    name, tensor = next(iter(whole.tensors.items()))
    some = Concept({name: tensor}, "cat", TEMPLATES, sd.architecture)
    zeros = {layer: t if layer == name else torch.zeros_like(t) for layer, t in whole.tensors.items()}
    filled = Concept(zeros, "cat", TEMPLATES, sd.architecture)
    assert torch.equal(denoise(sd, [some], PROMPTS, latents), denoise(sd, [filled], PROMPTS, latents))


def test_the_unet_is_edited_inside_the_with_only(sd, latents):
    modules = list(sd.unet.named_modules())
    with Customised(sd, [make_concept(sd)]) as customised:
        customised(PROMPTS)(latents, T)
        assert list(sd.unet.named_modules()) != modules
    assert list(sd.unet.named_modules()) == modules


def test_attention_maps(sd, latents):
    concept = make_concept(sd)
    with Customised(sd, [concept]) as customised:
        denoiser = customised(["a {}", "a dog"], map_grid=(8, 8))
        for t in (800, 200):
            denoiser(latents, torch.tensor(t))
    maps = denoiser.attention_maps
    assert maps.shape == (2, 1, 8, 8)
    assert maps[0].min() > 0 and maps.max() < 1
    assert not maps[1].any()

    # one layer at the grid's own size: the attention itself
    prompt, mask = concept_mask(sd.text.tokenizer, "a {}", "cat")
    text = sd.text([prompt])
    gates = Gate("sigmoid", 0.7, 0.15)(text, mask[None], target_input(sd.text, Word("cat", TEMPLATES)))
    totals = []
    for layer in cross_attention_layers(sd.unet).values():
        layer.register_forward_pre_hook(lambda module, args: totals.append(attention_on(module, args[0], text, gates)))
    expected = []
    for t in (800, 200):
        totals.clear()
        sd.unet(latents[:1], torch.tensor([t]), Context(text))
        expected.append(torch.stack(totals).mean(0))
    torch.testing.assert_close(maps[0, 0], torch.stack(expected).mean(0), atol=1e-5, rtol=1e-4)


def attention_on(layer, x, text, gates):
    """(8, 8): attention on the gated tokens, mean over heads, enlarged from the layer's own size."""
    weights = (layer.split(layer.to_q(x)) @ layer.split(layer.to_k(text)).mT / layer.dim_head**0.5).softmax(-1)
    mass = (weights @ gates[0]).mean(1)  # (1, N)
    side = round(mass.shape[1] ** 0.5)
    return torch.nn.functional.interpolate(mass.view(1, 1, side, side), (8, 8), mode="bilinear")[0, 0]


def test_maps_have_to_be_asked_for(sd, latents):
    with Customised(sd, [make_concept(sd)]) as customised:
        denoiser = customised(PROMPTS)
        denoiser(latents, T)
    with pytest.raises(ValueError, match="map_grid"):
        _ = denoiser.attention_maps


@pytest.mark.parametrize(
    "concepts, options, message",
    [
        ([], {}, "at least one concept"),
        ([{}], {"beta": [0.1, 0.2]}, "one beta for all"),
        ([{}], {"strength": [1, 1, 1]}, "one strength for all"),
        ([{}], {"tau": 0.0}, "tau"),
        ([{}], {"gate": ["hard", "hard"]}, "one gate for all"),
        ([{}], {"gate": "open"}, "gate: must be one of sigmoid, hard, global, not 'open'"),
        ([{}], {"noun": ["a", "b"]}, "one noun for all"),
        ([{}], {"region": [Region(2, 0, 0, 1, 1)]}, "the region 2:0,0,1,1 is of no concept"),
        ([{}, {"attention": "own"}], {}, "cannot be sampled together"),
        ([{"method": "hypnosis"}], {}, "no method 'hypnosis'"),
        ([{"covariance": "ab" * 32}], {}, "its gate needs the same file"),
    ],
)
def test_what_does_not_fit_is_an_error(sd, concepts, options, message):
    with pytest.raises(ValueError, match=message):
        Customised(sd, [make_concept(sd, **fields) for fields in concepts], Settings(**options))


def test_other_bases(sd):
    other = Concept({"input_blocks.99.attn2": torch.zeros(3)}, "cat", TEMPLATES, sd.architecture)
    with pytest.raises(ValueError, match="input_blocks.99.attn2.*has no place"):
        Customised(sd, [other])
    with pytest.raises(ValueError, match="does not fit 'tiny'"):
        Customised(sd, [Concept({"layer": torch.zeros(3)}, "cat", TEMPLATES, "sd15")])
    with pytest.warns(UserWarning, match="another checkpoint"):
        Customised(sd, [make_concept(sd, base_hash="ab" * 32)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Customised(sd, [make_concept(sd)])


def test_one_latent_for_each_prompt(sd, latents):
    with Customised(sd, [make_concept(sd)]) as customised, pytest.raises(ValueError, match="1 latents for 2"):
        customised(PROMPTS)(latents[:1], T)
    with pytest.raises(ValueError, match="at least one prompt"):
        customised([])


LONG = "red " * 90 + "{} on grass"


@pytest.mark.parametrize("own", [False, True])
def test_a_long_prompt_is_read_whole(sd, latents, own):
    """In windows that are encoded each by itself and attended to together, with the concept in the second."""
    concept = make_concept(sd, attention="own" if own else "foundation")
    tokenizer = sd.text.tokenizer
    inner = tokenizer.context_length - 2
    ids = tokenizer.encode(LONG.format("cat"))
    rows = [ids[start : start + inner] for start in range(0, len(ids), inner)]
    framed = [[tokenizer.bos, *row, tokenizer.eos] for row in rows]
    framed = torch.tensor([row + [tokenizer.pad] * (inner + 2 - len(row)) for row in framed])
    text = sd.text.encode_tokens(framed).flatten(0, 1)[None].repeat(2, 1, 1)  # (2, n·L, D)
    (cat,) = tokenizer.encode("cat")
    gates = Gate("hard")(text, (framed.flatten() == cat)[None].repeat(2, 1), None)
    residuals = {name: [tensor] for name, tensor in concept.tensors.items()}
    _, customised, _ = reference(sd.unet, residuals, latents, T.expand(2), text, gates[:, None], own)
    result = denoise(sd, [concept], [LONG] * 2, latents, gate="hard", scale=1)
    torch.testing.assert_close(result, customised, atol=1e-4, rtol=1e-4)
    other = denoise(sd, [concept], [LONG.replace("grass", "snow")] * 2, latents, gate="hard", scale=1)
    assert (result - other).abs().max() > 1e-4


def test_texts_of_other_lengths_beside_it_change_no_prompt(sd, latents):
    """For prompts together, and for a longer negative prompt."""
    concept, negative = make_concept(sd), "blurry " * 100
    together = denoise(sd, [concept], [LONG, "a {}"], latents, negative_prompt=negative)
    for i, prompt in enumerate((LONG, "a {}")):
        alone = denoise(sd, [concept], [prompt], latents[i : i + 1], negative_prompt=negative)
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-4, rtol=1e-4)
    shorter = denoise(sd, [concept], ["a {}"], latents[1:], negative_prompt="blurry " * 5)
    assert (together[1:] - shorter).abs().max() > 1e-4  # all of a negative prompt counts
