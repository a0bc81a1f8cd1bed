"""The demo: learns held-out concepts of the pocket world and puts them into contexts that they were never seen in."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from data.pocket.backgrounds import BACKGROUNDS
from data.pocket.classifier import SceneClassifier
from data.pocket.concepts import PocketConcept
from data.pocket.judge import hits, likeness, likeness_among, mean_and_error
from data.pocket.world import CHOICES, STYLE_WORDS, Scene
from infusion.concept import Concept
from infusion.sampling import Customised
from ldm.clip import Clip
from ldm.pipeline import StableDiffusion
from ldm.sampler import initial_noise, sample


def contexts(concept: PocketConcept, count: int = 8) -> list[Scene]:
    """Scenes of the concept's noun, styles taking turns, on backgrounds other than the one of its photos."""
    styles = CHOICES["style"]
    others = [background for background in BACKGROUNDS if background != concept.background]
    pairs = [(styles[i % 2], others[i % len(others)]) for i in range(count)]
    return [
        Scene(concept.noun, style, "natural", "plain", "medium", background, "middle") for style, background in pairs
    ]


def template(scene: Scene) -> str:
    """The scene's context as a prompt with `{}` for the object: "a cartoon of a {} on grass"."""
    return f"{STYLE_WORDS[scene.style][0]} a {{}} {BACKGROUNDS[scene.background]}"


@dataclass(frozen=True)
class Drawn:
    """Samples from the same seeds, each (prompts × seeds, …) with the seeds of a prompt side by side."""

    scenes: list[Scene]
    prompts: list[str]
    base: Tensor  # (B, 3, 64, 64) in [0, 1]
    customised: Tensor
    attention: Tensor  # (B, 16, 16): the foundation's attention on the concept's word


def draw(
    sd: StableDiffusion,
    concept: Concept,
    scenes: Sequence[Scene],
    seeds: int,
    steps: int,
    scale: float,
    batch_size: int = 16,
) -> Drawn:
    """Sample every context with the base model and with the concept; image i has the seed i."""
    scenes = [scene for scene in scenes for _ in range(seeds)]
    prompts = [template(scene) for scene in scenes]
    plain = [prompt.format(concept.superclass) for prompt in prompts]
    base = sd.sample(plain, steps=steps, scale=scale, batch_size=batch_size)
    images, maps = [], []
    shape = sd.latent_shape()
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        noise = initial_noise(range(start, start + len(batch)), shape, sd.device)
        with Customised(sd, [concept], batch, scale=scale, map_grid=shape[1:]) as denoise:
            images.append(sd.decode(sample(denoise, sd.schedule.scheduler("ddim"), noise, steps)))
        maps.append(denoise.attention_maps[:, 0])
    return Drawn(scenes, prompts, base, torch.cat(images), torch.cat(maps))


def judge(drawn: Drawn, photos: Tensor, clip: Clip, classifier: SceneClassifier) -> dict[str, dict]:
    """Likeness to the photos (N, 3, 64, 64), and how often background and style are the prompt's; with errors."""
    figures = {"photos": {"likeness": mean_and_error(likeness_among(clip, photos))}}
    for name, images in (("base", drawn.base), ("infusion", drawn.customised)):
        right = hits(classifier, images, drawn.scenes)
        figures[name] = {
            "likeness": mean_and_error(likeness(clip, images, photos)),
            "background": mean_and_error(torch.tensor(right["background"]).double()),
            "style": mean_and_error(torch.tensor(right["style"]).double()),
            "noun": mean_and_error(torch.tensor(right["noun"]).double()),
        }
    return figures


def heat(attention: Tensor, image: Tensor) -> Tensor:
    """An attention map (h, w), its maximum at full heat, over a faded image (3, H, W); (3, H, W) in [0, 1]."""
    level = F.interpolate(attention[None, None], image.shape[1:], mode="bilinear")[0, 0]
    level = level / level.max().clamp_min(1e-12)
    colours = torch.from_numpy(matplotlib.colormaps["inferno"](level.numpy())[..., :3]).float().permute(2, 0, 1)
    return 0.3 * image.mean(0, keepdim=True) + 0.7 * colours


def labelled_grid(photos: Tensor, drawn: Drawn, shown: Sequence[int], path: Path) -> None:
    """Write a PNG: the photos, then a column for each of the samples `shown`, base model above Infusion."""
    figure = Figure(figsize=(1.5 * len(shown), 5.4), layout="constrained")
    axes = figure.subplots(3, len(shown))
    rows = ("photos", "base model", "Infusion")
    for column, i in enumerate(shown):
        pictures = (photos[column] if column < len(photos) else None, drawn.base[i], drawn.customised[i])
        for ax, row, picture in zip(axes[:, column], rows, pictures, strict=True):
            ax.set_xticks([], [])
            ax.set_yticks([], [])
            ax.spines[:].set_visible(False)
            if picture is not None:
                ax.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
            if column == 0:
                ax.set_ylabel(row)
        axes[1, column].set_title(drawn.prompts[i].replace(" {} ", " {}\n"), fontsize=7)
    figure.savefig(path, dpi=130)
