"""Stable Diffusion as one object: text encoder, UNet, autoencoder and schedule, from a config and a checkpoint."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, Self
from warnings import warn

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from ldm.diffusion.sampler import Denoiser, Guided, initial_noise, sample
from ldm.diffusion.schedule import Schedule
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.text import ClipText, OpenClipText, TextPair
from ldm.models.unet import UNet
from ldm.util.cli import UserError, suggestion
from ldm.util.config import ConfigError, find, instantiate, load_config
from ldm.weights import checkpoint as files
from ldm.weights.names import by_prefix
from ldm.weights.recognise import guess, refusal, stated_prediction

DECODED = 4  # images at a time: more are no faster, and the decoder needs a gigabyte for one of 512 × 512
LARGE = 768 * 768  # pixels of an image; larger ones are decoded one at a time


class StableDiffusion(nn.Module):
    """A latent diffusion model (Rombach et al. 2022, arXiv 2112.10752).

    Args:
        unet, vae, text, schedule: the parts.
        name: architecture, such as "sd15", "sd21" or "pocket"; concepts remember it.
        image_size: height and width of the images that it was trained on, in pixels.
        checkpoint: its usual weights, relative to the working directory or else to the repository.

    Attributes:
        architecture: `name`.
        weights: the checkpoint, or diffusers folder, that the weights came from, or None.
        sources: component (unet, vae, text) -> the file or folder that its weights came from.
        use_ema: whether the UNet's weights are averages.
        config: the node of a config that it was built of, resolved; {} where it was built by hand.

    Raises:
        ValueError: parts that do not fit together.
    """

    def __init__(
        self,
        unet: UNet,
        vae: AutoencoderKL,
        text: ClipText | OpenClipText | TextPair,
        schedule: Schedule,
        name: str = "",
        image_size: int = 512,
        checkpoint: str | None = None,
    ) -> None:
        super().__init__()
        if unet.context_dim != text.width:
            raise UserError(f"the UNet takes text of width {unet.context_dim}, the text encoder gives {text.width}")
        if unet.pooled_dim != text.pooled_width:
            raise UserError(f"the UNet's pooled_dim is {unet.pooled_dim}, the text encoder's {text.pooled_width}")
        if unet.pooled_dim is not None and unet.pixels != vae.factor:
            raise UserError(f"the UNet's pixels is {unet.pixels}, the autoencoder's factor {vae.factor}")
        self.unet, self.vae, self.text, self.schedule = unet, vae, text, schedule
        self.architecture = name
        self.image_size = image_size
        self.checkpoint = checkpoint
        self.weights: Path | None = None
        self.sources: dict[str, Path] = {}
        self.use_ema = False
        self.config: dict[str, Any] = {}

    @classmethod
    def from_config(cls, config: str | Path | DictConfig) -> Self:
        """A model with random weights, on the CPU or on the device that `torch.device` sets.

        Args:
            config: a YAML file, or what `load_config` made of several; the model is its node `sd`.

        Raises:
            ValueError: a mistake in the config, named by its path there.
        """
        if not isinstance(config, DictConfig):
            config = load_config(config)
        if "sd" not in config:
            raise ConfigError("sd: the config has no such node, so it names no model")
        node = OmegaConf.to_container(config.sd, resolve=True)
        pipeline = instantiate(node, "sd")
        if not isinstance(pipeline, cls):
            raise ConfigError(f"sd.target: must be a {cls.__name__}, not a {type(pipeline).__name__}")
        pipeline.config = node
        return pipeline.eval()

    @classmethod
    def from_checkpoint(
        cls,
        config_path: str | Path | DictConfig,
        ckpt_path: str | Path | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        use_ema: bool | None = None,
        parts: Mapping[str, str | Path] | None = None,
    ) -> Self:
        """A trained model, frozen.

        Args:
            config_path: as for `from_config`.
            ckpt_path: `.safetensors` (or `.ckpt`) in LDM's layout, or a diffusers folder; None takes the model's usual
                file, which need not be there where all parts have files of their own.
            device: where it goes.
            dtype: of the UNet and the text encoder; the autoencoder, which overflows float16, stays in float32.
            use_ema: take the averaged weights of the UNet, `model_ema.*`; None: the config's key `use_ema`, else False.
            parts: component (unet, vae, text) -> file of its own, as for `load_part`; None: the config's key `parts`.

        Raises:
            ValueError: a mistake in the config, no such file, or a file that does not hold exactly this model.
        """
        config = config_path if isinstance(config_path, DictConfig) else load_config(config_path)
        with torch.device("meta"):
            pipeline = cls.from_config(config)
        pipeline.cast(dtype)
        parts = (config.get("parts") or {}) if parts is None else parts
        if not isinstance(parts, Mapping):
            raise ConfigError(f"parts: a mapping of unet, vae and text to files is wanted, not {parts!r}")
        parts = {component: file for component, file in parts.items() if file is not None}
        if ckpt_path is not None or parts.keys() != files.PREFIXES.keys():
            weights = pipeline._usual_weights(config.get("ckpt_source")) if ckpt_path is None else ckpt_path
            use_ema = bool(config.get("use_ema", False)) if use_ema is None else use_ema
            pipeline.load(weights, use_ema, device)
        for component, file in parts.items():
            pipeline.load_part(component, find(file), device)
        return pipeline.requires_grad_(False).to(device)

    def load(self, path: str | Path, use_ema: bool = False, device: torch.device | str = "cpu") -> None:
        """Load weights from a checkpoint, strictly.

        Warns of tensors of the file that the model has no place for.

        Args:
            path: as for `from_checkpoint`.
            use_ema: take the averaged weights of the UNet.
            device: where parts on the meta device go; the others stay where they are.

        Raises:
            ValueError: no such file, or a file that does not hold exactly this model.
        """
        path = Path(path)
        self._check_kind(path)
        unexpected = files.load_into(by_prefix(dict(self.named_children())), path, use_ema, device)
        if unexpected:
            shown = files.listed(unexpected)
            warn(f"{path}: {len(unexpected)} tensors have no place in {self.architecture}: {shown}", stacklevel=2)
        self.weights, self.sources, self.use_ema = path, dict.fromkeys(files.PREFIXES, path), use_ema
        vars(self).pop("digests", None)

    def load_part(self, component: str, path: str | Path, device: torch.device | str = "cpu") -> None:
        """Load one component from a file, strictly; its tensors may be named as in a checkpoint or as in the module.

        Args:
            component: unet, vae or text.
            path: a file; also one part of a diffusers folder.
            device: where the component goes if it is on the meta device.

        Raises:
            ValueError: no such component or file, or a file that does not hold exactly this component.
        """
        if component not in files.PREFIXES:
            raise UserError(f"parts.{component}: unknown component{suggestion(component, list(files.PREFIXES))}")
        path = Path(path)
        if component == "unet":
            self._check_kind(path)
        files.load_part(component, getattr(self, component), path, device)
        self.sources[component] = path
        self.use_ema &= component != "unet"
        vars(self).pop("digests", None)

    @cached_property
    def digests(self) -> dict[str, str]:
        """Component -> SHA-256, in hexadecimal, of the file that its weights came from."""
        by_file = {path: files.sha256(path) for path in set(self.sources.values())}
        return {component: by_file[path] for component, path in sorted(self.sources.items())}

    @property
    def hash(self) -> str | None:
        """What the weights are, in hexadecimal; None where some are random.

        SHA-256 of the checkpoint where all come from one and none are averages; otherwise of the lines
        `<component> <SHA-256 of its file>`, sorted, with a last line `use_ema` where the UNet's weights are averages.
        """
        if self.sources.keys() != files.PREFIXES.keys():
            return None
        if len(set(self.digests.values())) == 1 and not self.use_ema:
            return self.digests["unet"]
        lines = [f"{component} {digest}" for component, digest in self.digests.items()]
        return hashlib.sha256("\n".join(lines + ["use_ema"] * self.use_ema).encode()).hexdigest()

    @property
    def parts(self) -> dict[str, str]:
        """Component -> SHA-256 of its file, of those that come from another file than `weights`."""
        return {name: self.digests[name] for name, path in self.sources.items() if path != self.weights}

    @property
    def device(self) -> torch.device:
        """The UNet's device."""
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The UNet's dtype."""
        return next(self.unet.parameters()).dtype

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """Shape (C, h, w) of the latents of one image; None is the size of training.

        Raises:
            ValueError: a size, in pixels, that the autoencoder and the UNet cannot halve as often as they need.
        """
        height = self.image_size if height is None else height
        width = self.image_size if width is None else width
        multiple = self.vae.factor * self.unet.factor
        for side, size in (("height", height), ("width", width)):
            if size < multiple or size % multiple:
                below = max(size // multiple, 1) * multiple
                near = f"{below} or {below + multiple}" if size > multiple else str(multiple)
                raise UserError(f"{side} must be a multiple of {multiple} pixels, such as {near}, not {size}")
        return self.vae.embed_dim, height // self.vae.factor, width // self.vae.factor

    def cast(self, dtype: torch.dtype) -> None:
        """Gives the UNet and the text encoder this dtype; the autoencoder, which overflows float16, keeps its own."""
        self.unet.to(dtype)
        self.text.to(dtype)

    def autocast(self, precision: Literal["full", "autocast"]) -> AbstractContextManager:
        """With "autocast", bfloat16, or float16 on a device that lacks it, where torch deems it safe."""
        lacking = self.device.type == "cuda" and not torch.cuda.is_bf16_supported()
        return torch.autocast(self.device.type, torch.float16 if lacking else torch.bfloat16, precision == "autocast")

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] of scaled latents (B, C, h, w), in the autoencoder's own dtype throughout."""
        weight = next(self.vae.parameters())
        at_once = 1 if latents[0, 0].numel() * self.vae.factor**2 > LARGE else DECODED
        with torch.autocast(weight.device.type, enabled=False):
            images = torch.cat([self.vae.decode(part) for part in latents.to(weight).split(at_once)])
        return (images.float() / 2 + 0.5).clamp(0, 1).to(latents.device)

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        denoiser: Callable[[list[str]], Denoiser] | None = None,
        *,
        steps: int = 50,
        scale: float = 7.5,
        seed: int | Sequence[int] = 0,
        negative_prompt: str = "",
        eta: float = 0.0,
        sampler: str = "ddim",
        height: int | None = None,
        width: int | None = None,
        precision: Literal["full", "autocast"] = "full",
        batch_size: int | None = None,
        progress: bool = False,
    ) -> Tensor:
        """One image per prompt. An image depends on its own prompt and seed alone, not on the batch size.

        Args:
            prompts: B strings.
            denoiser: what predicts for a batch of prompts, guidance included; None is `guided` with `negative_prompt`
                and `scale`, which are for it alone.
            steps: sampling steps.
            scale: classifier-free guidance; 1 is none.
            seed: of the first image, where image `i` has `seed + i`; or B seeds, one for each.
            negative_prompt: what to guide away from; SDXL has zeros for "" (`ldm.models.text.TextPair.unconditional`).
            eta: share of DDIM's noise, in [0, 1]; for the ddim sampler only.
            sampler: a key of `ldm.diffusion.schedulers.SAMPLERS`.
            height, width: in pixels; None is the size of training.
            precision: "full" is the model's own; "autocast" runs the denoiser in half precision (`autocast`).
            batch_size: images at a time; None is all of them.
            progress: show a progress bar.

        Returns:
            (B, 3, H, W) float32 in [0, 1], on the model's device.

        Raises:
            ValueError: an argument is out of range.
        """
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"prompts must be a list of at least one string, not {prompts!r}")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        seeds = range(seed, seed + len(prompts)) if isinstance(seed, int) else seed
        if len(seeds) != len(prompts):
            raise ValueError(f"seed: give one, or one for each of {len(prompts)} prompts, not {len(seeds)}")
        if denoiser is None:
            denoiser = partial(self.guided, negative_prompt=negative_prompt, scale=scale)
        size = len(prompts) if batch_size is None else batch_size
        images = []
        for start in range(0, len(prompts), size):
            batch = slice(start, start + size)
            denoise = denoiser(list(prompts[batch]))
            with self.autocast(precision):
                latents = self.draw_latents(denoise, seeds[batch], steps, eta, sampler, height, width, progress)
            images.append(self.decode(latents))
        return torch.cat(images)

    @torch.no_grad()
    def guided(self, prompts: Sequence[str], negative_prompt: str = "", scale: float = 7.5) -> Guided:
        """The denoiser that guides towards B prompts and away from the negative one."""
        context = self.text.context(self.text.tokenizer.windows(prompts)).to(self.device, self.dtype)
        negative = self.text.unconditional(negative_prompt).to(self.device, self.dtype)
        return Guided(self.unet, context, negative, scale)

    @torch.no_grad()
    def draw_latents(
        self,
        denoise: Denoiser,
        seeds: Sequence[int],
        steps: int = 50,
        eta: float = 0.0,
        sampler: str = "ddim",
        height: int | None = None,
        width: int | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Latents (B, C, h, w), float32, scaled: one image per seed, by a denoiser for as many prompts.

        The rest as for `sample`; `decode` makes images of them.
        """
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        noise = initial_noise(generators, self.latent_shape(height, width), self.device)  # (B, C, h, w), float32
        return sample(denoise, self.schedule.scheduler(sampler), noise, steps, eta, generators, progress)

    @property
    def identity(self) -> dict[str, Any]:
        """All that its predictions and pictures depend on, as JSON has it: weights, dtype, and what it is built of.

        Weights without a `hash` all count as the same.
        """
        params = {name: value for name, value in (self.config.get("params") or {}).items() if name != "checkpoint"}
        return {
            "architecture": self.architecture,
            "weights": self.hash or "no file",
            "dtype": str(self.dtype),
            "image_size": self.image_size,
            "prediction_type": self.schedule.prediction_type,
            "config": params,
        }

    def _check_kind(self, path: Path) -> None:
        """A file may say what its UNet predicts and how its noise is scheduled, which shapes of tensors do not."""
        with files.open_checkpoint(path) as file:
            if why := refusal(file):
                raise UserError(f"{path}: {why}")
            (theirs, source), ours = stated_prediction(file), self.schedule.prediction_type
            if theirs is not None and theirs != ours:
                raise UserError(
                    f"{path}: its UNet predicts {theirs}, {self.architecture} predicts {ours} ({source}; "
                    f"sd.params.schedule.params.prediction_type is the key); {guess(file)}"
                )

    def _usual_weights(self, source: str | None) -> Path:
        """The usual weights' file; `source` says where to get it when it is not there."""
        if self.checkpoint is None:
            raise UserError(f"the model {self.architecture!r} has no usual checkpoint file: name one")
        if (path := find(self.checkpoint)).exists():
            return path
        hint = f"get it from {source}, or " if source else ""
        raise UserError(f"{self.checkpoint}: no such file; {hint}name another checkpoint of {self.architecture}")
