"""The pocket world: captioned 64-pixel scenes of one or two objects, with masks, drawn from a sprite atlas.

Each object has its own noun, drawing, colours, texture, size and place; the scene has a style and a background. Looks
vary independently of the noun, so a text-to-image model of this world has directions for them. Some combinations are
never trained on (`untrained`), so that composition can be tested.
"""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from data.pocket.backgrounds import BACKGROUNDS, paint
from data.pocket_two.scene import (
    COLOURS,
    DRAWINGS,
    NATURAL,
    NONE,
    NOUNS,
    PAIR_PLACES,
    PAIR_SIZES,
    PLACES,
    SIZES,
    STYLES,
    Placed,
    Scene,
    SceneWords,
    Thing,
)
from data.pocket_two.textures import WORDS, Texture, draw_texture, fields, overlay

ATLAS = Path(__file__).with_name("atlas.png")
SIZE = 64  # pixels of a scene's side
LUMINANCE = (0.299, 0.587, 0.114)

# Overlays that only concepts have.
HELD_OVERLAYS = (
    {"ringed", "rayed"},
    {"striped", "halved"},
    {"dotted", "halved"},
    {"dotted", "striped"},
    {"zigzag", "halved"},
)


def untrained(scene: SceneWords) -> bool:
    """Whether the scene has a combination that training never shows.

    Every noun lacks one colour, one texture and one background; some pairs of nouns never meet.
    """
    for thing in scene.things:
        noun = NOUNS.index(thing.noun)
        if thing.colour != NATURAL and tuple(COLOURS).index(thing.colour) == (3 * noun + 1) % len(COLOURS):
            return True
        if thing.texture in WORDS and WORDS.index(thing.texture) == (7 * noun + 3) % len(WORDS):
            return True
        if tuple(BACKGROUNDS).index(scene.background) == (5 * noun + 2) % len(BACKGROUNDS):
            return True
    nouns = [NOUNS.index(thing.noun) for thing in scene.things]
    return len(nouns) == 2 and sum(nouns) % 8 == 3


def second_colours(colour: str) -> list[str]:
    """Colours that stand out against one (against natural colours: all)."""
    if colour == NATURAL:
        return list(COLOURS)
    return [name for name, value in COLOURS.items() if math.dist(value, COLOURS[colour]) > 0.5]


def draw_thing(rng: np.random.Generator, held: bool = False) -> Thing:
    """A random object: a third in natural colours, two in five plain; of the first drawing set.

    `held`: also overlays that only concepts have.
    """
    colour = NATURAL if rng.random() < 0.3 else str(rng.choice(list(COLOURS)))
    kind = rng.random()
    textures: tuple[Texture, ...] = ()
    if kind > 0.4:
        textures = draw_textures(rng, worded=kind > 0.55, held=held)
    second = NONE
    if textures:
        others = second_colours(colour)
        second = "white" if "white" in others and rng.random() < 0.3 else str(rng.choice(others))
    return Thing(str(rng.choice(NOUNS)), colour=colour, second=second, textures=textures)


def draw_textures(rng: np.random.Generator, worded: bool, held: bool = False) -> tuple[Texture, ...]:
    """A texture that has a word, or one that has none: waves, or an overlay of two kinds."""
    if worded:
        return (draw_texture(rng, str(rng.choice(WORDS))),)
    if rng.random() < 0.5:
        return (draw_texture(rng, "waves"),)
    while True:
        kinds = rng.choice([word for word in WORDS if word != "faded"], 2, replace=False)
        if held or set(kinds) not in HELD_OVERLAYS:
            return tuple(draw_texture(rng, str(kind)) for kind in kinds)


def draw_scene(
    rng: np.random.Generator, untrained_ones: bool | None = False, pairs: float = 0.4, held: bool = False
) -> Scene:
    """A random scene.

    Args:
        untrained_ones: only scenes with an untrained combination (True), only scenes without (False), or all (None).
        pairs: the share of scenes with two objects.
        held: also what only concepts have: the third drawing set, for a quarter of the objects, and some overlays.
    """
    count = 2 if rng.random() < pairs else 1
    while True:
        style = str(rng.choice(STYLES))
        background = str(rng.choice(list(BACKGROUNDS)))
        places = PAIR_PLACES[rng.integers(len(PAIR_PLACES))] if count == 2 else (str(rng.choice(list(PLACES))),)
        things = []
        for place in places:
            # mostly the style's own drawing set, so that its word says the shape, but not always
            usual = "fluent" if style == "photo" else "noto"
            drawing = usual if rng.random() < 0.8 else "noto" if usual == "fluent" else "fluent"
            if held and rng.random() < 0.25:
                drawing = "twemoji"
            thing = replace(draw_thing(rng, held), drawing=drawing)
            things.append(Placed(thing, str(rng.choice(list(SIZES))), place, bool(rng.random() < 0.5)))
        scene = Scene(style, background, tuple(things))
        if count == 2 and things[0].thing.noun == things[1].thing.noun:
            continue
        if untrained_ones is None or untrained(scene.words()) == untrained_ones:
            return scene


# --- drawing ----------------------------------------------------------------------------------------------------------


def load_atlas(path: Path = ATLAS) -> Tensor:
    """Sprites as premultiplied RGBA in [0, 1], shape (drawings, nouns, 4, sprite, sprite)."""
    sheet = torch.from_numpy(np.asarray(Image.open(path).convert("RGBA")).copy()).float().div_(255)  # (3 S, nouns S, 4)
    side = sheet.shape[0] // len(DRAWINGS)
    sprites = (
        sheet.unflatten(0, (len(DRAWINGS), side)).unflatten(2, (len(NOUNS), side)).permute(0, 2, 4, 1, 3).contiguous()
    )
    sprites[:, :, :3] *= sprites[:, :, 3:]
    return sprites


class World:
    """Draws scenes."""

    def __init__(self, atlas: Path = ATLAS):
        self.sprites = load_atlas(atlas)

    def dye(self, things: list[Thing]) -> Tensor:
        """Recoloured, textured sprites of N objects: premultiplied RGBA (N, 4, s, s).

        The two colours are mixed by the texture, then shaded by the sprite's luminance: the mean luminance leaves a
        colour as it is, darker parts darken it and lighter parts lighten it. So eyes and edges stay through a texture.
        """
        sprites = torch.stack([self.sprites[DRAWINGS.index(t.drawing), NOUNS.index(t.noun)] for t in things])
        alpha = sprites[:, 3:]
        own = sprites[:, :3] / alpha.clamp_min(1e-4)  # (N, 3, s, s)
        luminance = (own * torch.tensor(LUMINANCE).view(3, 1, 1)).sum(1, keepdim=True)
        mean = (luminance * alpha).sum((2, 3), keepdim=True) / alpha.sum((2, 3), keepdim=True)
        shade = ((luminance - mean) * 1.1).clamp(-0.55, 0.45)

        def shaded(colours: list[str]) -> Tensor:
            base = torch.tensor([COLOURS.get(colour, (0.0, 0.0, 0.0)) for colour in colours]).view(-1, 3, 1, 1)
            lift = torch.tensor([0.08 if colour == "black" else 0.0 for colour in colours]).view(-1, 1, 1, 1)
            tone = shade + lift
            return torch.where(tone < 0, base * (1 + 1.2 * tone), base + (1 - base) * 0.85 * tone)

        natural = torch.tensor([thing.colour == NATURAL for thing in things]).view(-1, 1, 1, 1)
        first = torch.where(natural, own, shaded([thing.colour for thing in things]))
        weight = self._texture(things, sprites.shape[-1])[:, None]  # (N, 1, s, s)
        rgb = first + weight * (shaded([thing.second for thing in things]) - first)
        return torch.cat([rgb * alpha, alpha], 1)

    @staticmethod
    def _texture(things: list[Thing], side: int) -> Tensor:
        """Where each object has its second colour: (N, s, s) in [0, 1]."""
        weight = torch.zeros(len(things), side, side)
        for layer in range(2):
            rows = [i for i, thing in enumerate(things) if len(thing.textures) > layer]
            if rows:
                field = fields([things[i].textures[layer] for i in rows], side)
                weight[rows] = overlay(weight[rows], field)
        return weight

    def render(self, scenes: list[Scene], rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Draw scenes.

        Returns:
            Images (B, 3, 64, 64) in [0, 1] and masks (B, 2, 64, 64) in [0, 1] of the first and second object, the
            second empty where there is none; both float32.
        """
        layers = torch.zeros(2, len(scenes), 4, SIZE, SIZE)  # premultiplied
        for slot in range(2):
            rows = [i for i, scene in enumerate(scenes) if len(scene.things) > slot]
            if rows:
                layers[slot, rows] = self._place([scenes[i].things[slot] for i in rows], [scenes[i] for i in rows], rng)
        cartoon = torch.tensor([scene.style == "cartoon" for scene in scenes]).view(-1, 1, 1, 1)
        images = paint([s.background for s in scenes], [s.style == "cartoon" for s in scenes], SIZE, rng)
        for layer in layers:
            alpha = layer[:, 3:]
            shadow = F.avg_pool2d(F.pad(alpha, (2, 4, 1, 5)), 7, stride=1)[..., :SIZE, :SIZE]
            outline = F.max_pool2d(alpha, 3, stride=1, padding=1)
            images = images * torch.where(cartoon, 1 - 0.85 * outline, 1 - 0.4 * shadow)
            images = images * (1 - alpha) + layer[:, :3]
        masks = torch.cat([layers[0, :, 3:] * (1 - layers[1, :, 3:]), layers[1, :, 3:]], 1)
        return images.clamp_(0, 1), masks

    def _place(self, things: list[Placed], scenes: list[Scene], rng: np.random.Generator) -> Tensor:
        """One object of each scene where it belongs: premultiplied RGBA (B, 4, 64, 64)."""
        count = len(things)
        sprites = self.dye([placed.thing for placed in things])
        paired = np.array([len(scene.things) == 2 for scene in scenes])
        widths = np.array([(PAIR_SIZES if two else SIZES)[t.size] for t, two in zip(things, paired, strict=True)])
        widths = widths * rng.uniform(0.95, 1.05, count)
        directions = np.array([PLACES[t.place] for t in things], dtype=float)  # (B, 2)
        reach = np.where(paired, SIZE / 4, (SIZE - widths) / 2 - 1)[:, None]  # pixels from the middle
        loose = np.where(paired[:, None], (SIZE - widths[:, None]) / 4, 0.5 * reach)  # across the direction
        across = (directions == 0) & (directions.any(1)[:, None])
        jitter = rng.uniform(-1, 1, (count, 2)) * np.where(across, loose, np.where(paired[:, None], 0.5, 1.5))
        centres = directions * reach + jitter
        cut = rng.random(count) < 0.12  # these may leave the frame a little, unless there are two
        limit = (SIZE - widths) / 2 + np.where(cut & ~paired, 0.15 * widths, 0)
        centres = centres.clip(-limit[:, None], limit[:, None])
        angles = np.deg2rad(rng.uniform(-8, 8, count))

        zoom = SIZE / widths
        rotation = np.stack([np.cos(angles), np.sin(angles), -np.sin(angles), np.cos(angles)], 1).reshape(-1, 2, 2)
        rotation = rotation * zoom[:, None, None]
        rotation[:, 0] *= np.where([placed.mirrored for placed in things], -1, 1)[:, None]
        shift = -np.einsum("bij,bj->bi", rotation, centres / (SIZE / 2))
        theta = torch.from_numpy(np.concatenate([rotation, shift[:, :, None]], 2)).float()
        grid = F.affine_grid(theta, (count, 4, SIZE, SIZE), align_corners=False)
        layer = F.grid_sample(sprites, grid, align_corners=False)

        # light from one side, in photos
        turn = torch.from_numpy(rng.uniform(0, 2 * np.pi, count)).float().view(-1, 1, 1)
        strength = torch.from_numpy(rng.uniform(0, 0.22, count)).float().view(-1, 1, 1)
        photo = torch.tensor([scene.style == "photo" for scene in scenes]).view(-1, 1, 1)
        along = (grid[..., 0] * turn.cos() + grid[..., 1] * turn.sin()).clamp(-1, 1)
        light = torch.where(photo, 1 + strength * along, 1.0)[:, None]
        return torch.cat([torch.minimum(layer[:, :3] * light, layer[:, 3:]), layer[:, 3:]], 1)


def to_images(images: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [0, 1] -> PIL images."""
    return [Image.fromarray(image) for image in images.mul(255).round().byte().permute(0, 2, 3, 1).numpy()]
