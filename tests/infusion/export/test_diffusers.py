"""Pipelines of diffusers with concepts: exactly the base model without their tokens, and what the paper says with."""

import math
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compel import Compel
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import infusion
from infusion.export.diffusers import load_concept, mark, set_concepts, unload
from infusion.export.rows import Call, Edited, layer_names
from infusion.gate import Gate
from ldm.diffusion.sampler import initial_noise
from ldm.util.cli import UserError

NOUN, TOKEN = "a photo of a cat on grass", "a photo of a <rex> on grass"
PICTURE, MASK = torch.linspace(0, 1, 3 * 16 * 16).reshape(1, 3, 16, 16), torch.eye(16)[None, None]
SIZE = dict(height=16, width=16)


def draw(pipe: Any, prompts: str | list[str] | None, scale: float = 5.0, steps: int = 2, **choices: Any) -> Tensor:
    """Pictures (B, 3, H, W), the i-th from the noise of seed 3 + i."""
    many = len(choices["prompt_embeds"] if prompts is None else [prompts] if isinstance(prompts, str) else prompts)
    many *= choices.get("num_images_per_prompt", 1)
    generators = [torch.Generator().manual_seed(3 + i) for i in range(many)]
    return pipe(prompts, guidance_scale=scale, num_inference_steps=steps, generator=generators, output_type="pt",
                **choices).images  # fmt: skip


def noise(pipe: Any, seeds: list[int]) -> Tensor:
    return initial_noise(seeds, (4, 8, 8)).to(pipe.unet.dtype)


def distance(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape and a.isfinite().all()
    return (a - b).abs().max().item()


class TwoStreams:
    """The definition (README, Method), on a UNet of diffusers: a foundation pass, then `A_F (V + g r)` everywhere.

    Every cross-attention is computed here, with an explicit softmax, and nothing is a rank-one addition.
    """

    def __init__(self, unet: nn.Module, concept: Any, target: Tensor, text_of: Callable[[Tensor], Tensor]) -> None:
        names = {name: ours for ours, name in layer_names(unet).items()}
        self.residuals = {id(unet.get_submodule(name)): concept.tensors[ours] for name, ours in names.items()}
        self.gate, self.target, self.text_of = concept.gate.replace(beta=0.7, tau=0.15), target, text_of
        self.unet, self.forward, self.maps, self.gates = unet, unet.forward, {}, None

    def __call__(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **kwargs: Any) -> Any:
        places = self.text_of(encoder_hidden_states)
        gates = self.gate(encoder_hidden_states, places, self.target)
        self.gates, self.maps = None, {}
        first = self.forward(sample, timestep, encoder_hidden_states, **kwargs)[0]
        self.gates = gates
        second = self.forward(sample, timestep, encoder_hidden_states, **kwargs)[0]
        return (torch.where(places.any(1)[:, None, None, None], second, first),)

    def attend(self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *_: Any,
               **__: Any) -> Tensor:  # fmt: skip
        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        q, k, v = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        if self.gates is None:
            self.maps[id(attn)] = (split(q) @ split(k).mT * attn.scale).softmax(-1)
        else:
            v = v + self.gates[..., None] * self.residuals[id(attn)]
        return attn.to_out[0]((self.maps[id(attn)] @ split(v)).transpose(1, 2).flatten(2))

    def __enter__(self) -> None:
        self.before = {name: attn.processor for name, attn in self.layers()}
        for _, attn in self.layers():
            attn.processor = self.attend
        self.unet.forward = self

    def __exit__(self, *_: Any) -> None:
        for name, attn in self.layers():
            attn.processor = self.before[name]
        del self.unet.forward

    def layers(self) -> list[tuple[str, nn.Module]]:
        return [(name, self.unet.get_submodule(name)) for name in layer_names(self.unet).values()]


def reference(pipe: Any, concept: Any) -> TwoStreams:
    """Where the noun's encoding is known, and nothing else is."""

    def encode(prompt: str) -> tuple[Tensor, int]:
        ids = pipe.tokenizer(prompt).input_ids
        text = pipe.encode_prompt(prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)[0]
        return text[0], ids.index(pipe.tokenizer("cat").input_ids[1])

    found = [encode(template.replace("{}", "cat")) for template in concept.templates]
    known, place = encode(NOUN)

    def places(text: Tensor) -> Tensor:
        masks = torch.zeros(text.shape[:2], dtype=torch.bool)
        masks[:, place] = (text == known).all(2).all(1)
        return masks

    return TwoStreams(pipe.unet, concept, torch.stack([text[at] for text, at in found]).mean(0), places)


def controlnet(pipe: Any) -> ControlNetModel:
    torch.manual_seed(5)
    net = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(16, 32))
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return net.eval()


TASKS = {
    "text": lambda pipe: (pipe, SIZE),
    "several": lambda pipe: (pipe, SIZE | dict(num_images_per_prompt=2)),
    "img2img": lambda pipe: (of(pipe, StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline),
                             dict(image=PICTURE, strength=0.9)),
    "inpaint": lambda pipe: (of(pipe, StableDiffusionInpaintPipeline, StableDiffusionXLInpaintPipeline),
                             dict(image=PICTURE, mask_image=MASK, strength=0.9) | SIZE),
    "control": lambda pipe: (of(pipe, StableDiffusionControlNetPipeline, StableDiffusionXLControlNetPipeline,
                                controlnet=controlnet(pipe)), dict(image=PICTURE)),
    "control, guessing": lambda pipe: (of(pipe, StableDiffusionControlNetPipeline, StableDiffusionXLControlNetPipeline,
                              controlnet=controlnet(pipe)), dict(image=PICTURE, guess_mode=True)),
}  # fmt: skip


def of(pipe: Any, sd: type, sdxl: type, **parts: Any) -> Any:
    pipe = (sdxl if hasattr(pipe, "tokenizer_2") else sd).from_pipe(pipe, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("layout", ["sd15", "sd21"])
def test_a_batch_of_different_concepts_is_what_our_own_sampler_draws(models, pipeline, concept, layout, tmp_path):
    """Two concepts of one noun, one of two tokens, all three in one prompt, and their nouns in words, in one call."""
    sd, pipe = models(layout)[0], pipeline(layout)
    rex, tom, toy = concept(sd.unet), concept(sd.unet, seed=2), concept(sd.unet, "stuffed animal", 3, gate=Gate("hard"))
    rex.save(tmp_path / "rex.safetensors")
    words = ["a photo of a cat", "a stuffed animal in the (cat) by cat"]
    plain = draw(pipe, words, latents=noise(pipe, [3, 4]), **SIZE)
    assert distance(plain, infusion.sample(sd, words, steps=2, scale=5.0, seed=3)) < 1e-5

    load_concept(pipe, tmp_path / "rex.safetensors", token="<rex>")
    load_concept(pipe, tom, token="tomcat1", strength=0.7, beta=0.5, tau=0.3)
    load_concept(pipe, toy, token="<toy>")
    prompts = ["a photo of a <rex>", "a photo of a tomcat1", "a <toy> in the (<rex>) by tomcat1", "a <toy>"]
    mixed = draw(pipe, [words[0], *prompts, words[1]], latents=noise(pipe, [3, 3, 3, 4, 5, 4]), **SIZE)
    ours = [
        infusion.sample(sd, ["a photo of a {}"], [rex], steps=2, scale=5.0, seed=3),
        infusion.sample(sd, ["a photo of a {}"], [tom], steps=2, scale=5.0, seed=3, strength=0.7, beta=0.5, tau=0.3),
        infusion.sample(sd, ["a {1} in the ({2}) by {3}"], [toy, rex, tom], steps=2, scale=5.0, seed=4,
                        strength=(1, 1, 0.7), beta=(0.7, 0.7, 0.5), tau=(0.15, 0.15, 0.3)),
        infusion.sample(sd, ["a {}"], [toy], steps=2, scale=5.0, seed=5),
    ]  # fmt: skip
    for drawn, wanted in zip(mixed[1:5], ours, strict=True):
        assert distance(drawn[None], wanted) < 1e-5
    assert distance(mixed[[0, 5]], plain) < 1e-5  # a batch of another size rounds differently
    assert min(distance(mixed[0], mixed[1]), distance(mixed[1], mixed[2])) > 1e-3


@pytest.mark.parametrize("layout", ["sd15", "sdxl"])
@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_the_base_without_the_token_and_two_streams_with_it(pipeline, concept, task, layout):
    pipe = pipeline(layout)
    rex = concept(pipe.unet)
    worker, choices = TASKS[task](pipe)
    scales = (5.0, 1.0) if task in ("text", "img2img") else (5.0,)
    plain = {scale: draw(worker, [NOUN, "a dog"], scale, **choices) for scale in scales}
    with reference(pipe, rex):
        wanted = {scale: draw(worker, [NOUN, "a dog"], scale, **choices) for scale in scales}
    load_concept(pipe, rex, token="<rex>")
    for scale in scales:
        assert torch.equal(draw(worker, [NOUN, "a dog"], scale, **choices), plain[scale])
        drawn = draw(worker, [TOKEN, "a dog"], scale, **choices)
        assert distance(drawn, wanted[scale]) < 1e-5 and distance(drawn, plain[scale]) > 1e-4
    set_concepts(worker, strength=0.0)
    silent = draw(worker, [TOKEN, "a dog"], scale, **choices)
    if "control" in task:  # a ControlNet reads encodings with their mark, the smallest change of a few numbers
        assert distance(silent, plain[scale]) < 1e-5
    else:
        assert torch.equal(silent, plain[scale])
    unload(worker)
    assert torch.equal(draw(worker, [NOUN, "a dog"], scale, **choices), plain[scale])


def test_encodings_made_before_are_recognised(pipeline, concept):
    pipe = pipeline("sd15")
    load_concept(pipe, concept(pipe.unet), token="<rex>")
    wanted = draw(pipe, [TOKEN, NOUN], **SIZE)
    text, negative = pipe.encode_prompt([TOKEN, NOUN], "cpu", 1, True)
    assert torch.equal(draw(pipe, None, prompt_embeds=text, negative_prompt_embeds=negative, **SIZE), wanted)

    plain = pipe.encode_prompt(NOUN, "cpu", 1, False)[0]
    marked = mark(pipe, plain, [TOKEN])  # as from a file, or weighted
    given = dict(prompt_embeds=torch.cat([marked, plain]), negative_prompt_embeds=negative)
    assert torch.equal(draw(pipe, None, **given, **SIZE), wanted)


def test_a_prompt_in_chunks_has_its_concept_where_it_stands(pipeline, concept):
    """As tools for long prompts encode them: rows of 77 tokens, one behind the other."""
    pipe = pipeline("sd15")
    rex = concept(pipe.unet)
    texts = [pipe.encode_prompt(p, "cpu", 1, False)[0] for p in ("a dog", NOUN, "")]
    load_concept(pipe, rex, token="<rex>")
    token = pipe.encode_prompt(TOKEN, "cpu", 1, False)[0]
    step = dict(sample=noise(pipe, [1]), timestep=500, return_dict=False)
    long = pipe.unet(encoder_hidden_states=torch.cat([texts[0], token], 1), **step)[0]
    unload(pipe)
    target = reference(pipe, rex).target
    places = torch.zeros(1, 154, dtype=torch.bool)
    places[0, 77 + pipe.tokenizer(NOUN).input_ids.index(pipe.tokenizer("cat").input_ids[1])] = True
    with TwoStreams(pipe.unet, rex, target, lambda text: places):
        wanted = pipe.unet(encoder_hidden_states=torch.cat(texts[:2], 1), **step)[0]
    assert distance(long, wanted) < 1e-5


def test_words_weighted_by_compel(pipeline, concept):
    pipe = pipeline("sd15")
    rex = concept(pipe.unet)
    weigh = Compel(tokenizer=pipe.tokenizer, text_encoder=pipe.text_encoder)
    plain = weigh("a photo of a (cat)1.3 on (grass)0.8")
    place = pipe.tokenizer(NOUN).input_ids.index(pipe.tokenizer("cat").input_ids[1])
    load_concept(pipe, rex, token="<rex>")
    step = dict(sample=noise(pipe, [1]), timestep=500, return_dict=False)
    marked = mark(pipe, weigh("a photo of a (<rex>)1.3 on (grass)0.8"), [TOKEN])
    drawn = pipe.unet(encoder_hidden_states=marked, **step)[0]
    unload(pipe)
    places = torch.arange(77)[None] == place
    with TwoStreams(pipe.unet, rex, reference(pipe, rex).target, lambda text: places):
        assert distance(drawn, pipe.unet(encoder_hidden_states=plain, **step)[0]) < 1e-5


def test_the_page_shows_what_runs(models, pipeline, concept, tmp_path, monkeypatch):
    """The five lines, and those about several concepts, on a tiny model."""
    concept(pipeline("sd15").unet).save(tmp_path / "cat.safetensors")
    concept(pipeline("sd15").unet, "dog", 2).save(tmp_path / "dog.safetensors")
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[3] / "docs" / "diffusers.md").read_text()
    lines, more = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    shown: dict = {}
    exec(lines.replace("stable-diffusion-v1-5/stable-diffusion-v1-5", str(models("sd15")[1])), shown)
    assert shown["image"].size == (16, 16)
    exec(more, shown)
    unload(shown["pipe"])


def test_half_precision(pipeline, new_pipeline, concept):
    """Sixteen bits tell marked and plain encodings of the same words apart, and draw the same picture."""
    pipe, half = pipeline("sd15"), new_pipeline("sd15", torch.bfloat16)
    rex = concept(pipe.unet)
    plain = draw(half, [NOUN, NOUN], latents=noise(half, [3, 3]), **SIZE)
    for each in (pipe, half):
        load_concept(each, rex, token="<rex>", strength=4.0)
    full, drawn = (draw(each, [TOKEN, NOUN], latents=noise(each, [3, 3]), **SIZE).float() for each in (pipe, half))
    assert distance(drawn[1], plain[1].float()) < 0.2 * distance(drawn[0], drawn[1])
    assert (drawn - full).pow(2).mean() < 0.04 * (full[0] - full[1]).pow(2).mean()
    half.text_encoder.float()  # its marks must survive the UNet's type
    text = half.encode_prompt([TOKEN, NOUN], "cpu", 1, False)[0].bfloat16()
    step = half.unet(noise(half, [3, 3]), 500, text, return_dict=False)[0]
    assert distance(step[0], step[1]) > 0.01


@pytest.mark.parametrize("first", ["offload", "concept"])
def test_parts_that_move_to_the_device_when_they_are_called(new_pipeline, concept, first):
    """Accelerate's hooks, in either order and taken off in the middle; the device is the CPU again."""
    pipe = new_pipeline("sd15")
    rex = concept(pipe.unet)
    plain = draw(pipe, [NOUN], **SIZE)
    load_concept(pipe, rex, token="<rex>")
    wanted = draw(pipe, [TOKEN], **SIZE)
    if first == "offload":
        unload(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    if first == "offload":
        load_concept(pipe, rex, token="<rex>")
    assert torch.equal(draw(pipe, [TOKEN], **SIZE), wanted)
    if first == "offload":
        pipe.remove_all_hooks()
        assert torch.equal(draw(pipe, [TOKEN], **SIZE), wanted)
    unload(pipe)
    assert torch.equal(draw(pipe, [NOUN], **SIZE), plain)


@pytest.mark.parametrize("first", ["compile", "concept"])
@pytest.mark.slow
def test_compiled_unets(new_pipeline, concept, first):
    """Compiled before, the UNet stays one graph: the hooks are around it."""
    pipe = new_pipeline("sd15")
    rex = concept(pipe.unet)
    load_concept(pipe, rex, token="<rex>")
    wanted = draw(pipe, [TOKEN, NOUN], **SIZE)
    if first == "compile":
        unload(pipe)
    pipe.unet = torch.compile(pipe.unet, backend="eager", fullgraph=first == "compile")
    if first == "compile":
        load_concept(pipe, rex, token="<rex>")
    assert distance(draw(pipe, [TOKEN, NOUN], **SIZE), wanted) < 1e-5


def test_beside_a_lora(new_pipeline, concept):
    """PEFT's layers change what foundation and customised rows have in common."""
    pipe = new_pipeline("sd15")
    rex = concept(pipe.unet)
    torch.manual_seed(7)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    before = draw(pipe, [NOUN], **SIZE)
    load_concept(pipe, rex, token="<rex>")
    pipe.unet.add_adapter(config, adapter_name="style")
    drawn = draw(pipe, [TOKEN], **SIZE)
    unload(pipe)
    styled = draw(pipe, [NOUN], **SIZE)
    with reference(pipe, rex):
        wanted = draw(pipe, [NOUN], **SIZE)
    assert distance(drawn, wanted) < 1e-5 and min(distance(drawn, styled), distance(styled, before)) > 1e-3
    load_concept(pipe, rex, token="<rex>")
    pipe.unet.delete_adapters("style")
    assert torch.equal(draw(pipe, [NOUN], **SIZE), before)


def test_beside_an_image_prompt(new_pipeline, concept):
    """An IP-Adapter, put in while the concept is there; its processors stay where others look for them."""
    pipe = new_pipeline("sd15")
    rex, unet = concept(pipe.unet), pipe.unet
    load_concept(pipe, rex, token="<rex>")
    torch.manual_seed(8)
    weights = {"image_proj": {"proj.weight": torch.randn(4 * 32, 24), "proj.bias": torch.zeros(128),
                              "norm.weight": torch.ones(32), "norm.bias": torch.zeros(32)},
               "ip_adapter": {}}  # fmt: skip
    for n, name in enumerate(name for name in unet.attn_processors if "attn2" in name):
        width = unet.get_submodule(name.removesuffix(".processor")).inner_dim
        weights["ip_adapter"] |= {f"{2 * n + 1}.to_{c}_ip.weight": torch.randn(width, 32) for c in "kv"}
    unet._load_ip_adapter_weights([weights])
    image = [torch.randn(2, 1, 24)]  # of the negative prompt and of the prompt
    choices = dict(ip_adapter_image_embeds=image) | SIZE
    pipe.set_ip_adapter_scale(0.0)
    without = draw(pipe, [TOKEN], **choices)
    pipe.set_ip_adapter_scale(0.6)
    drawn, plain = draw(pipe, [TOKEN], **choices), draw(pipe, [NOUN], **choices)
    set_concepts(pipe, strength=0.0)
    assert torch.equal(draw(pipe, [TOKEN], **choices), plain)
    assert min(distance(drawn, plain), distance(drawn, without)) > 1e-3
    unload(pipe)
    assert torch.equal(draw(pipe, [NOUN], **choices), plain)
    assert all(isinstance(unet.get_submodule(name).processor, IPAdapterAttnProcessor2_0)
               for name in layer_names(unet).values())  # fmt: skip


def test_threads(pipeline, new_pipeline, concept):
    """Two pipelines of their own, and two that share a UNet, draw at once what each draws alone."""
    pipes = [pipeline("sd15"), new_pipeline("sd15")]
    for seed, pipe in enumerate(pipes):
        load_concept(pipe, concept(pipe.unet, seed=seed), token="<rex>")
        load_concept(pipe, concept(pipe.unet, "dog", seed + 2), token="<fido>")
    scheduler = pipes[0].scheduler
    pipes.append(type(pipes[0]).from_pipe(pipes[0], scheduler=type(scheduler).from_config(scheduler.config)))
    pipes[2].set_progress_bar_config(disable=True)
    jobs = []
    for pipe, prompt in zip(pipes, ("a <rex>", "a <fido> and a <rex>", "a <fido> and a cat"), strict=True):
        text, negative = pipe.encode_prompt([prompt, "a cat"], "cpu", 1, True)
        jobs.append((pipe, dict(prompt_embeds=text, negative_prompt_embeds=negative) | SIZE))
    alone = [draw(pipe, None, steps=4, **given) for pipe, given in jobs]
    together: list[Tensor | None] = [None] * len(jobs)

    def work(place: int) -> None:
        pipe, given = jobs[place]
        together[place] = draw(pipe, None, steps=4, **given)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("layout", ["sd15", "sdxl"])
def test_nothing_is_left_of_it(pipeline, concept, layout):
    pipe = pipeline(layout)
    modules = [pipe.unet, pipe.text_encoder, *([pipe.text_encoder_2] if layout == "sdxl" else [])]
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs")

    def traces() -> list:
        every = [named for top in modules for named in top.named_modules()]
        own = [(name, sorted(vars(m)), *(len(getattr(m, hook)) for hook in hooks)) for name, m in every]
        return [own, [list(m.state_dict()) for m in modules], pipe.unet.attn_processors.keys(),
                len(pipe.tokenizer), pipe.tokenizer("a <rex>").input_ids, sorted(vars(pipe))]  # fmt: skip

    plain = draw(pipe, [NOUN, "a <rex>"], **SIZE)  # it leaves traces of its own
    before = traces()
    weights = [{name: tensor.clone() for name, tensor in m.state_dict().items()} for m in modules]
    load_concept(pipe, concept(pipe.unet), token="<rex>")
    load_concept(pipe, concept(pipe.unet, "big dog", 2), token="<dog>")
    draw(pipe, ["a <rex> and a <dog>"], **SIZE)
    unload(pipe, "<rex>")
    assert traces() != before
    unload(pipe)
    assert traces() == before
    assert all(torch.equal(tensor, was[name]) for m, was in zip(modules, weights, strict=True)
               for name, tensor in m.state_dict().items())  # fmt: skip
    assert torch.equal(draw(pipe, [NOUN, "a <rex>"], **SIZE), plain)


def test_what_is_refused_leaves_the_pipeline_as_it_was(new_pipeline, concept):
    pipe = new_pipeline("sd15")
    rex = concept(pipe.unet)
    plain = draw(pipe, [NOUN], **SIZE)
    of = lambda **fields: concept(pipe.unet, **fields)  # noqa: E731
    layer = next(iter(rex.tensors))
    bad = of()
    bad.tensors[layer] = torch.ones(3)
    for given, said in [
        (dict(concept=of(method="lora")), "learned by lora"),
        (dict(concept=of(attention="own")), "own attention"),
        (dict(concept=of(architecture="sd15")), "trained on 'sd15', whose text is 768 wide"),
        (dict(concept=of(covariance="0" * 64)), "inverse_covariance"),
        (dict(concept=bad), f"no cross-attention {layer} of width 3"),
        (dict(concept="gone.safetensors"), "gone.safetensors: there is no such concept file"),
        (dict(token="dog"), "no new word"),
        (dict(token="a b"), "no new word"),
        (dict(token=""), "no new word"),
        (dict(strength=math.nan), "strength"),
        (dict(tau=0.0), "tau"),
        (dict(gate="soft"), "kind"),
    ]:
        with pytest.raises(UserError, match=said):
            load_concept(pipe, **dict(concept=rex, token="<rex>") | given)
        assert not pipe.unet._forward_pre_hooks and len(pipe.tokenizer) == pipe.text_encoder.config.vocab_size
    with pytest.raises(UserError, match="no concept"):
        unload(pipe)
    load_concept(pipe, rex, token="<rex>")
    for call in (lambda: set_concepts(pipe, "<tom>", strength=1.0), lambda: unload(pipe, "<tom>")):
        with pytest.raises(UserError, match="no concept '<tom>'; there are <rex>"):
            call()
    with pytest.raises(UserError, match="no new word"):
        load_concept(pipe, rex, token="<rex>")
    pipe.tokenizer.add_tokens("<other>")
    with pytest.raises(UserError, match="other tokens"):
        unload(pipe)
    assert torch.equal(draw(pipe, [NOUN], **SIZE), plain)


def test_a_guided_step_of_sd15_takes_less_than_half_as_much_arithmetic_again():
    """Three rows for two, and the third has no cross-attention of its own; at 64 x 64."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)  # the rest is SD 1.5's by default
        text, latents = torch.zeros(2, 77, 768), torch.zeros(3, 4, 64, 64)
        layers = {name: unet.get_submodule(name) for name in layer_names(unet).values()}
        residuals = {name: torch.zeros(1, layer.inner_dim) for name, layer in layers.items()}
        call = Call(text, torch.ones(1, dtype=torch.long), torch.zeros(1, 1, 77), residuals)
    assert len(layers) == 16 and sum(residual.numel() for residual in residuals.values()) == 12_480
    for name, layer in layers.items():
        Edited(layer, name)
    costs = []
    for rows, context in ((2, text), (3, call)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            unet(latents[:rows], torch.zeros((), device="meta"), context)
        costs.append(counter.get_total_flops())
    print(f"{costs[0] / 1e9:.0f} and {costs[1] / 1e9:.0f} GFLOP: {costs[1] / costs[0]:.3f} x")
    assert costs[1] / costs[0] < 1.495
