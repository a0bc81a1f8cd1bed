"""The pocket world: captioned 64-pixel scenes of one object, with masks, drawn from a sprite atlas.

A scene is seven independent choices: noun, drawing style, colour, pattern, size, background, place. Because colour and
pattern vary independently of the noun, a text-to-image model of this world has directions for them in its values. Some
combinations are never trained on (`untrained`), so that composition can be tested.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from data.pocket.backgrounds import BACKGROUNDS, paint
from data.pocket.scene import NATURAL, Scene

ATLAS = Path(__file__).with_name("atlas.png")
SIZE = 64  # pixels of a scene's side

NOUNS = ("cat", "dog", "horse", "cow", "pig", "rabbit", "elephant", "penguin", "owl", "fish",
         "turtle", "butterfly", "bee", "apple", "banana", "pineapple", "strawberry", "avocado", "carrot",
         "mushroom",
         "hamburger", "pizza", "cupcake", "bus", "car", "airplane", "rocket", "sailboat", "guitar", "book",
         "umbrella", "balloon", "gift", "teapot", "rose", "sunflower", "cactus", "crown", "hat",
         "backpack")  # fmt: skip
STYLES = ("photo", "cartoon")
DRAWINGS = ("photo", "cartoon", "unseen")  # rows of the atlas; the third is never shown by the world
COLOURS = {"red": (0.85, 0.10, 0.10), "orange": (1.0, 0.52, 0.05), "yellow": (0.98, 0.86, 0.10),
           "green": (0.10, 0.60, 0.18), "blue": (0.10, 0.32, 0.90), "purple": (0.52, 0.16, 0.72),
           "black": (0.13, 0.13, 0.14), "white": (0.96, 0.96, 0.96)}  # fmt: skip
PATTERNS = ("plain", "striped", "dotted")
UNSEEN_PATTERNS = ("checkered", "zigzag", "halved")  # for concepts only
SIZES = {"small": 28, "medium": 36, "large": 46}  # pixels
PLACES = {"middle": (0, 0), "left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}


CHOICES = {"noun": NOUNS, "style": STYLES, "colour": (NATURAL, *COLOURS), "pattern": PATTERNS, "size": tuple(SIZES),
           "background": tuple(BACKGROUNDS), "place": tuple(PLACES)}  # fmt: skip


def untrained(scene: Scene) -> bool:
    """Whether the scene has a combination that training never shows.

    Every noun lacks one colour, every second noun one pattern, every (noun, style) one background.
    """
    noun = NOUNS.index(scene.noun)
    colour = scene.colour != NATURAL and tuple(COLOURS).index(scene.colour) == (3 * noun + 1) % len(COLOURS)
    pattern = noun % 2 == 0 and PATTERNS.index(scene.pattern) == 1 + (noun // 2) % 2
    context = tuple(BACKGROUNDS).index(scene.background) == (5 * noun + 3 * STYLES.index(scene.style)) % len(
        BACKGROUNDS
    )
    return colour or pattern or context


def draw_scene(rng: np.random.Generator, untrained_ones: bool | None = False) -> Scene:
    """A random scene; about half of the objects keep their natural colours, and half are plain.

    `untrained_ones`: only scenes with an untrained combination (True), only scenes without (False), or all (None).
    """
    while True:
        pick = {name: words[rng.integers(len(words))] for name, words in CHOICES.items()}
        if rng.random() < 0.35:
            pick["colour"] = NATURAL
        if rng.random() < 0.4:
            pick["pattern"] = "plain"
        scene = Scene(**pick)
        if untrained_ones is None or untrained(scene) == untrained_ones:
            return scene


def draw_sibling(scene: Scene, rng: np.random.Generator, untrained_ones: bool | None = False) -> Scene:
    """A random scene that differs from this one in a single part; `untrained_ones` as in `draw_scene`.

    Noun and place, which are the hardest to tell apart, change more often than the other parts.
    """
    while True:
        part = rng.choice([*CHOICES, *2 * ("noun",), *4 * ("place",)])
        others = [word for word in CHOICES[part] if word != getattr(scene, part)]
        sibling = replace(scene, **{part: others[rng.integers(len(others))]})
        if untrained_ones is None or untrained(sibling) == untrained_ones:
            return sibling


# --- captions ---------------------------------------------------------------------------------------------------------

STYLE_WORDS = {
    "photo": ("a photo of", "a photo of", "a photograph of"),
    "cartoon": ("a cartoon of", "a cartoon of", "a drawing of"),
}
NEUTRAL_WORDS = ("", "", "a picture of", "an image of", "a close-up of", "a rendering of")
PLACE_WORDS = {
    "middle": "in the middle",
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
}


def caption(scene: Scene, rng: np.random.Generator | None = None, keep: float = 0.75) -> str:
    """Describe the scene; with `rng`, each part but the noun is kept with probability `keep` only.

    Natural colours, plain patterns and medium size have no word.
    """

    def said(probability: float = keep) -> bool:
        return rng is None or rng.random() < probability

    colour = scene.colour if scene.colour != NATURAL and said(0.9) else ""
    pattern = scene.pattern if scene.pattern != "plain" and said(0.9) else ""
    size = scene.size if scene.size != "medium" and said(0.6) else ""
    things = " ".join(word for word in (size, pattern, colour, scene.noun) if word)
    article = "an" if things[0] in "aeiou" else "a"
    if rng is None:
        start = STYLE_WORDS[scene.style][0]
    else:
        starts = STYLE_WORDS[scene.style] if said() else NEUTRAL_WORDS
        start = starts[rng.integers(len(starts))]
        article = ("the", "my", "one")[rng.integers(3)] if rng.random() < 0.15 else article
    parts = [start, article, things]
    if said():
        parts.append(BACKGROUNDS[scene.background])
    if said(0.6):
        parts.append(PLACE_WORDS[scene.place])
    if rng is not None and parts[0] == "" and rng.random() < 0.3:
        parts[1] = ""
    return " ".join(part for part in parts if part)


# --- drawing ----------------------------------------------------------------------------------------------------------


def load_atlas(path: Path = ATLAS) -> Tensor:
    """Sprites as premultiplied RGBA in [0, 1], shape (drawings, nouns, 4, sprite, sprite)."""
    sheet = torch.from_numpy(np.asarray(Image.open(path).convert("RGBA")).copy()).float().div_(255)  # (3 S, nouns S, 4)
    count = {"drawing": len(DRAWINGS), "noun": len(NOUNS)}
    sprites = rearrange(sheet, "(drawing h) (noun w) c -> drawing noun c h w", **count).contiguous()
    sprites[:, :, :3] *= sprites[:, :, 3:]
    return sprites


def pattern_mask(pattern: str, side: int) -> Tensor:
    """Where the second colour of a pattern goes, in [0, 1], shape (side, side), in the sprite's own frame."""
    y, x = torch.meshgrid(torch.linspace(0, 1, side), torch.linspace(0, 1, side), indexing="ij")
    wave = {
        "plain": torch.full_like(x, -1),
        "striped": torch.sin(2 * torch.pi * 4 * (y + 0.35 * x)),
        "dotted": torch.cos(2 * torch.pi * 3.5 * x) + torch.cos(2 * torch.pi * 3.5 * y) - 0.7,
        "checkered": torch.sin(2 * torch.pi * 2.5 * x) * torch.sin(2 * torch.pi * 2.5 * y) * 2,
        "zigzag": torch.sin(2 * torch.pi * 3 * (y + 0.16 * (2 * (4 * x % 1) - 1).abs() * 2)),
        "halved": 8 * (y - 0.5),
    }[pattern]
    return (0.5 + 3 * wave).clamp(0, 1)


def dye(sprite: Tensor, colour: str, pattern: str, second: str | None = None) -> Tensor:
    """Recolour and pattern one premultiplied RGBA sprite (4, s, s), keeping its shading.

    Luminance becomes a ramp through the colour: itself at the sprite's mean luminance, shades below, tints above.
    The pattern's other colour is `second`, by default white, or navy on light objects.
    """
    rgb, alpha = sprite[:3] / sprite[3:].clamp_min(1e-4), sprite[3:]
    luminance = (rgb * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0, keepdim=True)
    mean = (luminance * alpha).sum() / alpha.sum()
    if colour != NATURAL:
        base = torch.tensor(COLOURS[colour]).view(3, 1, 1)
        shade = ((luminance - mean) * 1.1).clamp(-0.55, 0.45)
        if colour == "black":
            shade = shade + 0.08
        rgb = torch.where(shade < 0, base * (1 + shade * 1.2), base + (1 - base) * shade)
        mean = (base.squeeze() * torch.tensor([0.299, 0.587, 0.114])).sum()
    contrast = COLOURS[second] if second else (0.97, 0.97, 0.95) if mean < 0.62 else (0.15, 0.15, 0.30)
    weight = 0.75 * pattern_mask(pattern, sprite.shape[-1])
    return torch.cat([(rgb + weight * (torch.tensor(contrast).view(3, 1, 1) - rgb)) * alpha, alpha])


class World:
    """Draws scenes; the sprites are dyed once and kept."""

    def __init__(self, atlas: Path = ATLAS):
        self.sprites = load_atlas(atlas)
        self._dyed: dict[tuple, Tensor] = {}

    def sprite(self, drawing: str, noun: str, colour: str, pattern: str, second: str | None = None) -> Tensor:
        """Premultiplied RGBA, shape (4, s, s)."""
        key = (drawing, noun, colour, pattern, second)
        if key not in self._dyed:
            self._dyed[key] = dye(self.sprites[DRAWINGS.index(drawing), NOUNS.index(noun)], colour, pattern, second)
        return self._dyed[key]

    def render(
        self, scenes: list[Scene], rng: np.random.Generator, drawing: str | None = None, second: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw scenes.

        Returns images (B, 3, 64, 64) in [0, 1] and the objects' masks (B, 1, 64, 64) in [0, 1], both float32.
        `drawing` replaces each scene's own drawing (`DRAWINGS`), keeping its style of background and outline, and
        `second` its pattern's other colour.
        """
        sprites = torch.stack(
            [self.sprite(drawing or s.style, s.noun, s.colour, s.pattern, second) for s in scenes]
        )  # (B, 4, s, s)
        widths = np.array([SIZES[s.size] for s in scenes]) * rng.uniform(0.94, 1.06, len(scenes))
        reach = (SIZE - widths) / 2 + 2
        centres = np.array([PLACES[s.place] for s in scenes]) * reach[:, None] + rng.uniform(-2, 2, (len(scenes), 2))
        angles = np.deg2rad(rng.uniform(-6, 6, len(scenes)))

        zoom = SIZE / widths
        rotation = (
            np.stack([np.cos(angles), np.sin(angles), -np.sin(angles), np.cos(angles)], 1).reshape(-1, 2, 2)
            * zoom[:, None, None]
        )
        shift = -np.einsum("bij,bj->bi", rotation, centres / (SIZE / 2))
        theta = torch.from_numpy(np.concatenate([rotation, shift[:, :, None]], 2)).float()
        grid = F.affine_grid(theta, (len(scenes), 4, SIZE, SIZE), align_corners=False)
        layer = F.grid_sample(sprites, grid, align_corners=False)  # (B, 4, 64, 64), premultiplied
        alpha = layer[:, 3:]

        cartoon = torch.tensor([s.style == "cartoon" for s in scenes]).view(-1, 1, 1, 1)
        images = paint([s.background for s in scenes], [s.style == "cartoon" for s in scenes], SIZE, rng)
        shadow = F.avg_pool2d(F.pad(alpha, (2, 4, 1, 5)), 7, stride=1)[..., :SIZE, :SIZE]
        outline = F.max_pool2d(alpha, 3, stride=1, padding=1)
        images = images * torch.where(cartoon, 1 - 0.85 * outline, 1 - 0.4 * shadow)
        images = images * (1 - alpha) + layer[:, :3]
        return images.clamp_(0, 1), alpha


def to_images(images: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [0, 1] -> PIL images."""
    return [Image.fromarray(image) for image in rearrange(images.mul(255).round().byte(), "b c h w -> b h w c").numpy()]
