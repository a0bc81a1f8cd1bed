"""SDXL at full size with random weights, which diffusers' and transformers' models share in memory.

python -m tests.parity.sdxl_full_size --dtype bfloat16
python -m tests.parity.sdxl_full_size --config configs/backbone/pocket_xl.yaml      # a rehearsal

Prints the norm of each difference divided by that of the reference. Ends with an error above 2e-4 in float32; bfloat16
keeps 8 bits, so there the bound is 5e-2.
"""

import argparse
import math
import resource
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from infusion.inject import remove
from infusion.methods.infusion import Infusion
from infusion.training.trainer import ConceptTrainer
from ldm.diffusion.sampler import initial_noise
from ldm.models.attention import Context
from ldm.pipeline import StableDiffusion
from ldm.weights.diffusers_layout import diffusers_names, transposes
from ldm.weights.export import text_config, unet_config, vae_config

CONFIG = Path(__file__).parents[2] / "configs/backbone/sdxl.yaml"
PROMPTS = ["a photo of a cat", "two dogs on a hill"]
TEMPLATES = ["a photo of a {}", "the {} in a box"]


def fill(module: nn.Module, dtype: torch.dtype) -> None:
    """Random values that keep the scale of activations: of unit gain for matrices, about 1 for the weights of norms."""
    module.to(dtype).to_empty(device="cpu")
    for name, tensor in module.named_parameters():
        scale = 0.1 if tensor.dim() < 2 or "embedding" in name else 1 / math.sqrt(math.prod(tensor.shape[1:]))
        tensor.normal_(std=scale).add_(float(tensor.dim() == 1 and name.endswith("weight")))


def sharing(peer: nn.Module, ours: nn.Module) -> nn.Module:
    """The peer, built on the meta device, with views of our tensors for its own."""
    state, views = ours.state_dict(), {}
    for name, targets in diffusers_names(ours).items():
        tensor = state[name].mT if transposes(name, targets) else state[name]
        views |= dict(zip(targets, tensor.chunk(len(targets)), strict=True))
    known, tensors = peer.state_dict(), {}
    for name, view in views.items():
        own = next(n for n in (name, f"text_model.{name}") if n in known)
        tensors[own] = view.reshape(known[own].shape)
    peer.load_state_dict(tensors, assign=True)
    for module in peer.modules():  # made on the meta device, and in no file
        if "position_ids" in dict(module.named_buffers(recurse=False)):
            module.position_ids = torch.arange(module.position_ids.shape[1])[None]
    return peer.eval()


def compare(what: str, actual: Tensor, reference: Tensor, bound: float) -> None:
    difference = (actual.double() - reference.double()).norm() / reference.double().norm()
    print(f"{what}: {difference:.1e}", flush=True)
    if not difference <= bound:
        raise SystemExit(f"{what}: differs by more than {bound}")


class Comparison:
    """The parts, each filled where it is asked for, and what is compared of them."""

    def __init__(self, dtype: torch.dtype, config: Path = CONFIG) -> None:
        with torch.device("meta"):
            self.sd = StableDiffusion.from_config(config).requires_grad_(False)
            side = self.sd.image_size
            self.unet = UNet2DConditionModel.from_config(unet_config(self.sd.unet, side // self.sd.vae.factor))
            self.vae = AutoencoderKL.from_config(vae_config(self.sd.vae, side))
        self.dtype, self.bound = dtype, 2e-4 if dtype == torch.float32 else 5e-2
        self.generator, self.filled = torch.manual_seed(0), set()

    def need(self, *parts: str) -> None:
        for part in set(parts) - self.filled:
            module = getattr(self.sd, part)
            kept = {name: buffer for name, buffer in module.named_buffers() if not buffer.is_meta}  # in no file
            fill(module, torch.float32 if part == "vae" else self.dtype)
            for name, buffer in kept.items():
                path, _, leaf = name.rpartition(".")
                setattr(module.get_submodule(path), leaf, buffer)
            self.filled.add(part)

    @property
    def context(self) -> Context:
        """Of the prompts; random where the text encoders are not needed."""
        if "text" in self.filled:
            return self.sd.text.context(self.sd.text.tokenizer(PROMPTS))
        length, pooled = self.sd.text.tokenizer.context_length, torch.randn(2, self.sd.unet.pooled_dim)
        return Context(torch.randn(2, length, self.sd.text.width), pooled=pooled).to("cpu", self.dtype)

    def size(self, height: int, width: int) -> dict[str, int]:
        """In pixels, given that of the latents."""
        return {"height": height * self.sd.vae.factor, "width": width * self.sd.vae.factor}

    def text(self) -> None:
        self.need("text")
        outputs = []
        for cls, text in zip((CLIPTextModel, CLIPTextModelWithProjection), self.sd.text.embedders, strict=True):
            with torch.device("meta"):
                peer = cls(CLIPTextConfig(**text_config(text)))
            outputs.append(sharing(peer, text)(text.tokenizer(PROMPTS), output_hidden_states=True))
        context = self.context
        compare("text", context.text, torch.cat([output.hidden_states[-2] for output in outputs], -1), self.bound)
        compare("pooled vector", context.pooled, outputs[1].text_embeds, self.bound)

    def autoencoder(self) -> None:
        self.need("vae")
        sharing(self.vae, self.sd.vae)
        size, scale = self.size(32, 24).values(), self.vae.config.scaling_factor
        images = torch.rand(1, 3, *size, generator=self.generator) * 2 - 1
        latents = self.vae.encode(images).latent_dist.mean * scale
        compare("autoencoder, encoding", self.sd.vae.encode(images), latents, 2e-4)
        compare("autoencoder, decoding", self.sd.vae.decode(latents), self.vae.decode(latents / scale)[0], 2e-4)

    def predictions(self) -> None:
        self.need("unet")
        sharing(self.unet, self.sd.unet)
        context, timesteps = self.context, torch.tensor([981, 3])
        for height, width in ((32, 32), (24, 40)):
            latents = torch.randn(2, 4, height, width, generator=self.generator).to(self.dtype)
            sizes = torch.tensor([[1024, 1024, 0, 0, 1024, 1024], [1536, 768, 256, 0, 8 * height, 8 * width]])
            given = Context(context.text, pooled=context.pooled, sizes=sizes)
            added = {"text_embeds": context.pooled, "time_ids": sizes.float()}
            theirs = self.unet(latents, timesteps, context.text, added_cond_kwargs=added).sample
            compare(f"UNet, latents {height} × {width}", self.sd.unet(latents, timesteps, given), theirs, self.bound)

    def steps(self) -> None:
        self.need("text", "unet", "vae")
        sharing(self.unet, self.sd.unet)
        sharing(self.vae, self.sd.vae)
        size, context = self.size(24, 32), self.context.map(lambda rows: rows[:1])
        ours = self.sd.draw_latents(self.sd.guided(PROMPTS[:1], scale=5.0), [3], steps=10, **size)
        scheduler = DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
            set_alpha_to_one=False, steps_offset=1,
        )  # fmt: skip
        parts = {"vae": self.vae, "unet": self.unet, "scheduler": scheduler, "add_watermarker": False}
        nothing = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
        pipeline = StableDiffusionXLPipeline(**parts, **nothing)
        pipeline.set_progress_bar_config(disable=True)
        reference = pipeline(
            prompt_embeds=context.text, negative_prompt_embeds=torch.zeros_like(context.text),
            pooled_prompt_embeds=context.pooled, negative_pooled_prompt_embeds=torch.zeros_like(context.pooled),
            num_inference_steps=10, guidance_scale=5.0, output_type="latent",
            latents=initial_noise([3], self.sd.latent_shape(**size)).to(self.dtype), **size,
        ).images  # fmt: skip
        compare("ten guided steps", ours, reference, self.bound)

    def training(self) -> None:
        self.need("text", "unet")
        with torch.enable_grad():
            train(self.sd)


PARTS = ("text", "autoencoder", "predictions", "steps", "training")


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG, help="the same structure at another size")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS, help="smaller machines: one at a time")
    flags = parser.parse_args(arguments)
    comparison = Comparison(getattr(torch, flags.dtype), flags.config)
    for part in flags.only:
        getattr(comparison, part)()
    print(f"memory at the peak: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")


def train(sd: StableDiffusion) -> None:
    """Two optimiser steps of Infusion, on latents of 16 × 16; all residuals have moved after them."""
    sd.unet.checkpoint = True
    trainer = ConceptTrainer(sd, Infusion(), "cat", TEMPLATES)
    optimiser = trainer.configure_optimizers()
    batch = {"latents": torch.randn(1, 4, 16, 16), "template": TEMPLATES[:1]}
    batch["sizes"] = torch.tensor([[1200, 900, 128, 0, 1024, 1024]])
    for step in range(2):
        optimiser.zero_grad()
        loss = trainer.denoising_loss(batch, torch.Generator().manual_seed(step), {})
        loss.backward()
        optimiser.step()
        print(f"optimiser step {step + 1}: loss {loss:.4f}", flush=True)
    moved = sum(bool(tensor.any()) for tensor in trainer.tensors.values())
    numbers = sum(tensor.numel() for tensor in trainer.tensors.values())
    remove(sd.unet)
    print(f"{moved} of {len(trainer.tensors)} residuals moved, {numbers:,} parameters")
    if moved < len(trainer.tensors):
        raise SystemExit("some residuals did not move")


if __name__ == "__main__":
    main()
