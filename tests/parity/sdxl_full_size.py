"""SDXL at full size with random weights, which diffusers' and transformers' models share in memory.

python -m tests.parity.sdxl_full_size --dtype bfloat16

Prints the norm of each difference divided by that of the reference. Ends with an error above 2e-4 in float32; bfloat16
keeps 8 bits, so there the bound is 2e-2.
"""

import argparse
import gc
import math
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
    module.to(dtype).to_empty(device="cpu") if any(p.is_meta for p in module.parameters()) else module.to(dtype)
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


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    dtype = getattr(torch, parser.parse_args().dtype)
    bound, generator = 2e-4 if dtype == torch.float32 else 2e-2, torch.manual_seed(0)
    with torch.device("meta"):
        sd = StableDiffusion.from_config(CONFIG)
        first, second = sd.text.embedders
        texts = [CLIPTextModel(CLIPTextConfig(**text_config(first)))]
        texts += [CLIPTextModelWithProjection(CLIPTextConfig(**text_config(second)))]
        unet = UNet2DConditionModel.from_config(unet_config(sd.unet, 128))
        vae = AutoencoderKL.from_config(vae_config(sd.vae, 1024))
    sd.requires_grad_(False)
    buffers = {text: dict(text.named_buffers()) for text in sd.text.embedders}  # real already
    for part, own in ((first, dtype), (second, dtype), (sd.vae, torch.float32), (sd.unet, dtype)):
        kept = {name: buffer.clone() for name, buffer in buffers.get(part, {}).items() if not buffer.is_meta}
        fill(part, own)
        for name, buffer in kept.items():
            path, _, leaf = name.rpartition(".")
            setattr(part.get_submodule(path), leaf, buffer)

    context = sd.text.context(sd.text.tokenizer(PROMPTS))
    outputs = [
        sharing(peer, text)(text.tokenizer(PROMPTS), output_hidden_states=True)
        for peer, text in zip(texts, sd.text.embedders, strict=True)
    ]
    compare("text", context.text, torch.cat([output.hidden_states[-2] for output in outputs], -1), bound)
    compare("pooled vector", context.pooled, outputs[1].text_embeds, bound)

    sharing(unet, sd.unet)
    for height, width in ((32, 32), (24, 40)):
        latents = torch.randn(2, 4, height, width, generator=generator).to(dtype)
        sizes = torch.tensor([[1024, 1024, 0, 0, 1024, 1024], [1536, 768, 256, 0, 8 * height, 8 * width]])
        given, timesteps = Context(context.text, pooled=context.pooled, sizes=sizes), torch.tensor([981, 3])
        added = {"text_embeds": context.pooled, "time_ids": sizes.float()}
        theirs = unet(latents, timesteps, context.text, added_cond_kwargs=added).sample
        compare(f"UNet, latents {height} × {width}", sd.unet(latents, timesteps, given), theirs, bound)

    sharing(vae, sd.vae)
    images = torch.rand(1, 3, 256, 192, generator=generator) * 2 - 1
    latents = vae.encode(images).latent_dist.mean * vae.config.scaling_factor
    compare("autoencoder, encoding", sd.vae.encode(images), latents, 2e-4)
    compare("autoencoder, decoding", sd.vae.decode(latents), vae.decode(latents / vae.config.scaling_factor)[0], 2e-4)

    size = {"height": 192, "width": 256}
    ours = sd.draw_latents(sd.guided(PROMPTS[:1], scale=5.0), [3], steps=10, **size)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    nothing = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipeline = StableDiffusionXLPipeline(vae=vae, unet=unet, scheduler=scheduler, add_watermarker=False, **nothing)
    pipeline.set_progress_bar_config(disable=True)
    text, pooled = context.text[:1], context.pooled[:1]
    reference = pipeline(
        prompt_embeds=text, pooled_prompt_embeds=pooled, negative_prompt_embeds=torch.zeros_like(text),
        negative_pooled_prompt_embeds=torch.zeros_like(pooled), num_inference_steps=10, guidance_scale=5.0,
        latents=initial_noise([3], sd.latent_shape(**size)).to(dtype), output_type="latent", **size,
    ).images  # fmt: skip
    compare("ten guided steps", ours, reference, 10 * bound)
    del pipeline, unet, vae, texts, outputs
    gc.collect()
    train(sd)


@torch.enable_grad()
def train(sd: StableDiffusion) -> None:
    """Two optimiser steps of Infusion, on latents of 128 × 128 pixels."""
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


if __name__ == "__main__":
    main()
