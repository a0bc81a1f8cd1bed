"""One training step, and ten, of each baseline beside diffusers' and PEFT's own modules (docs/parity.md).

Both sides have the same weights, photos, noise and timesteps. A peer's step is what diffusers' script of that method
does in a step: encode, predict, mean squared error, AdamW.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import CustomDiffusionAttnProcessor
from peft import LoraConfig
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from infusion.deltas import TEXT
from infusion.methods.base import TOKENS, Method
from infusion.methods.custom_diffusion import CustomDiffusion
from infusion.methods.dreambooth import DreamBooth
from infusion.methods.lora import DOWN, UP, LoRA
from infusion.methods.textual_inversion import TextualInversion
from infusion.tokens import fill
from infusion.training.trainer import ConceptTrainer
from ldm.pipeline import StableDiffusion
from ldm.weights.diffusers_layout import diffusers_names
from ldm.weights.export import text_config, unet_config

TEMPLATES = ["a photo of a {}", "the {} in a box"]
PRIOR = "a photo of a cat"
LOSS, STEPS = 1e-4, 1e-3  # relative: of one step's loss and gradients, and of what ten steps change


@dataclass
class Peer:
    """diffusers' and transformers' models of one base model.

    Attributes:
        ids, prior_ids: of the prompts.
        places: our name of a tensor -> the model that has it, and its name there.
    """

    unet: UNet2DConditionModel
    text: CLIPTextModel
    scheduler: DDPMScheduler
    ids: Tensor
    prior_ids: Tensor
    places: dict[str, tuple[nn.Module, str]]

    @classmethod
    def of(cls, sd: StableDiffusion, noun: str) -> "Peer":
        """Its tensors are those of `sd` itself: what is trained of them has to be copied first."""
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(unet_config(sd.unet, sd.image_size // sd.vae.factor))
        unet.load_state_dict(under_their_names(sd.unet), assign=True)
        text = CLIPTextModel(CLIPTextConfig(**text_config(sd.text)))
        level = "text_model." if hasattr(text, "text_model") else ""  # by transformers' version
        text.load_state_dict({f"{level}{name}": t for name, t in under_their_names(sd.text).items()}, assign=True)
        ids = sd.text.tokenizer([fill(template, [noun]) for template in TEMPLATES])
        scheduler = DDPMScheduler.from_config(sd.schedule.scheduler("ddim").config)
        places = {ours: (unet, theirs) for ours, (theirs,) in diffusers_names(sd.unet).items()}
        of_text = diffusers_names(sd.text).items()
        places |= {f"{TEXT}{ours}": (text, f"{level}{theirs}") for ours, (theirs,) in of_text}
        unet, text = unet.eval().requires_grad_(False), text.eval().requires_grad_(False)
        return cls(unet, text, scheduler, ids, sd.text.tokenizer([PRIOR] * len(TEMPLATES)), places)

    def add_token(self, old: int) -> nn.Parameter:
        """A new last row of the embeddings, which stands for `old` in the prompts; the whole table, to be trained."""
        new = len(self.text.get_input_embeddings().weight)
        self.text.resize_token_embeddings(new + 1, mean_resizing=False)
        table = self.text.get_input_embeddings().weight
        with torch.no_grad():
            table[new] = table[old]
        self.ids = torch.where(self.ids == old, new, self.ids)
        return table.requires_grad_()

    def loss(self, latents: Tensor, timesteps: Tensor, noise: Tensor, prior: bool) -> Tensor:
        noisy = self.scheduler.add_noise(latents, noise, timesteps).to(self.unet.dtype)
        hidden = self.text(self.prior_ids if prior else self.ids)[0]
        prediction = self.unet(noisy, timesteps, hidden).sample
        return F.mse_loss(prediction.float(), noise.float(), reduction="mean")


def under_their_names(module: nn.Module) -> dict[str, Tensor]:
    state = module.state_dict()
    return {theirs: state[ours] for ours, (theirs,) in diffusers_names(module).items()}


# Each of these makes a peer ready for its method, and says which of its tensors is which of the concept's.


def textual_inversion(sd: StableDiffusion, peer: Peer, start: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    return {TOKENS: peer.add_token(sd.text.tokenizer.encode("cat")[0])}


def custom_diffusion(sd: StableDiffusion, peer: Peer, start: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    processors = {}
    for name, module in peer.unet.named_modules():
        if name.endswith(("attn1", "attn2")):
            cross = module.to_k.in_features if name.endswith("attn2") else None
            own = CustomDiffusionAttnProcessor(cross is not None, False, module.to_k.out_features, cross)
            if cross is not None:
                own.to_k_custom_diffusion.load_state_dict(module.to_k.state_dict())
                own.to_v_custom_diffusion.load_state_dict(module.to_v.state_dict())
            processors[f"{name}.processor"] = own
    peer.unet.set_attn_processor(dict(processors))  # which it empties
    learned = {TOKENS: peer.add_token(sd.text.tokenizer.encode("sks")[0])}
    for ours in start:
        if ours != TOKENS:
            layer, part, _ = peer.places[ours][1].rsplit(".", 2)
            learned[ours] = getattr(processors[f"{layer}.processor"], f"{part}_custom_diffusion").weight
    return learned


def dreambooth(sd: StableDiffusion, peer: Peer, start: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    peer.unet, peer.text = deepcopy(peer.unet), deepcopy(peer.text)
    models = {False: peer.unet, True: peer.text}
    places = {ours: (models[ours.startswith(TEXT)], peer.places[ours][1]) for ours in start}
    return {ours: module.get_parameter(theirs).requires_grad_() for ours, (module, theirs) in places.items()}


def lora(sd: StableDiffusion, peer: Peer, start: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """As `train_dreambooth_lora.py` sets it up; A is at random, so ours is copied."""
    how = {"r": 4, "lora_alpha": 4, "init_lora_weights": "gaussian"}
    peer.unet.add_adapter(LoraConfig(target_modules=["to_k", "to_q", "to_v", "to_out.0"], **how))
    if any(name.startswith(TEXT) for name in start):
        peer.text.add_adapter(LoraConfig(target_modules=["q_proj", "k_proj", "v_proj", "out_proj"], **how))
    learned = {}
    for ours in [name.removesuffix(UP) for name in start if name.endswith(UP)]:
        module, theirs = peer.places[ours]
        layer = module.get_submodule(theirs.removesuffix(".weight"))
        learned |= {f"{ours}{DOWN}": layer.lora_A["default"].weight, f"{ours}{UP}": layer.lora_B["default"].weight}
    with torch.no_grad():
        for name, parameter in learned.items():
            parameter.copy_(start[name])
    adapted = [p for module in (peer.unet, peer.text) for p in module.parameters() if p.requires_grad]
    assert {id(p) for p in adapted} == {id(p) for p in learned.values()}  # the same layers
    return learned


@dataclass(frozen=True)
class Case:
    """A method, how its peer is set up, and settings of the training that the script has too."""

    method: Callable[[], Method]
    peer: Callable[..., dict[str, nn.Parameter]]
    learning_rate: float
    weight_decay: float = 0.01
    prior: bool = False
    dtype: torch.dtype = torch.float32


DOUBLE = {"dtype": torch.float64}  # in float32, AdamW moves what has no gradient but rounding as far as anything else
CASES = {
    "textual_inversion": Case(TextualInversion, textual_inversion, 5e-3),
    # what these learn is a difference for us, and decays towards the base model; theirs decays towards zero
    "custom_diffusion": Case(CustomDiffusion, custom_diffusion, 1e-3, weight_decay=0.0, prior=True),
    "dreambooth": Case(DreamBooth, dreambooth, 1e-3, weight_decay=0.0, prior=True, **DOUBLE),
    "dreambooth_text": Case(lambda: DreamBooth(train_text_encoder=True), dreambooth, 1e-3, 0.0, True, **DOUBLE),
    "lora": Case(LoRA, lora, 1e-2),
    "lora_text": Case(lambda: LoRA(train_text_encoder=True), lora, 1e-2, prior=True),
}


def apart(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The norm of the difference of all tensors together, divided by the norm of theirs."""
    squares = [(((ours[name] - theirs[name]).double() ** 2).sum(), (theirs[name].double() ** 2).sum()) for name in ours]
    difference, norm = (torch.stack(values).sum().sqrt().item() for values in zip(*squares, strict=True))
    assert ours.keys() == theirs.keys() and norm > 0
    return difference / norm


def compare(sd: StableDiffusion, case: Case, size: int, steps: int) -> tuple[float, float, float]:
    """How far apart one step's losses and gradients are, and what several steps change."""
    sd.to(case.dtype)
    peer_of = Peer.of(sd, case.method().noun("cat"))
    how = {"learning_rate": case.learning_rate, "weight_decay": case.weight_decay}
    module = ConceptTrainer(sd, case.method(), "cat", TEMPLATES, **how)
    module.log = module.log_dict = lambda *_, **__: None
    start = {name: tensor.detach().clone() for name, tensor in module.tensors.items()}
    learned = case.peer(sd, peer_of, start)
    theirs = torch.optim.AdamW(learned.values(), lr=case.learning_rate, weight_decay=case.weight_decay)
    ours = module.configure_optimizers()

    def whole(name: str, tensor: Tensor) -> Tensor:
        """Of the table of embeddings, the row that is learned."""
        return tensor[-1:] if name == TOKENS else tensor

    before = {name: whole(name, tensor).detach().clone() for name, tensor in learned.items()}
    generator = torch.Generator().manual_seed(7)
    for step in range(steps):
        latents = torch.randn(4, 4, size, size, generator=generator)
        batch = {"latents": latents[:2], "template": TEMPLATES}
        if case.prior:
            batch["prior"] = {"latents": latents[2:], "template": [PRIOR] * 2}
        ours.zero_grad()
        theirs.zero_grad()
        loss = module.training_step(batch, step)
        loss.backward()
        other = peer_of.loss(latents[:2], *module.draw(latents[:2], module.generator(step)), prior=False)
        if case.prior:
            draws = module.draw(latents[2:], module.generator(step, 1))
            other = other + 1.0 * peer_of.loss(latents[2:], *draws, prior=True)
        other.backward()
        if step == 0:
            of_loss = abs(loss.item() - other.item()) / other.item()
            of_gradient = apart(
                {name: tensor.grad for name, tensor in module.tensors.items()},
                {name: whole(name, tensor.grad) for name, tensor in learned.items()},
            )
        rows = learned[TOKENS][:-1].detach().clone() if TOKENS in learned else None
        ours.step()
        theirs.step()
        if rows is not None:  # as the scripts do: of the table, the new row alone is learned
            with torch.no_grad():
                learned[TOKENS][:-1] = rows
    of_steps = apart(
        {name: tensor.detach() - start[name] for name, tensor in module.tensors.items()},
        {name: whole(name, tensor).detach() - before[name] for name, tensor in learned.items()},
    )
    print(f"loss {of_loss:.1e}, gradient {of_gradient:.1e}, change in {steps} steps {of_steps:.1e}")
    return of_loss, of_gradient, of_steps


@pytest.mark.parametrize("name", CASES)
def test_ten_steps_are_those_of_diffusers(name, sd):
    of_loss, of_gradient, of_steps = compare(sd, CASES[name], size=8, steps=10)
    assert of_loss < LOSS and of_gradient < LOSS and of_steps < STEPS


@pytest.mark.slow
@pytest.mark.parametrize("name", ["textual_inversion", "custom_diffusion", "lora"])  # of DreamBooth: 20 GB
def test_a_step_at_full_size_is_that_of_diffusers(name, random_checkpoint, configs):
    sd = StableDiffusion.from_checkpoint(configs / "sd15.yaml", random_checkpoint("sd15"))
    of_loss, of_gradient, _ = compare(sd, CASES[name], size=16, steps=1)
    assert of_loss < LOSS and of_gradient < LOSS
