"""Exact measures of a sample of a concept: the world knows how the concept is drawn.

The object of a sample is cut out by its mask, moved to the middle and scaled to one area, as is the concept's own
drawing. The drawing is tried upright, mirrored and turned by up to 8 degrees, as the world turns it; the best counts.
"""

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from data.pocket_two.scene import COLOURS, Thing
from data.pocket_two.world import World

SIDE = 32  # pixels of an object that is cut out
ANGLES = (-8, -4, 0, 4, 8)  # degrees
SHARP = 50.0  # of the assignment of a pixel to a named colour, per squared distance of RGB in [0, 1]


class Drawing:
    """A concept's own drawing, to compare samples with.

    Samples are images (B, 3, H, W) in [0, 1] with masks (B, H, W) of their object in [0, 1]; figures are (B,).
    """

    def __init__(self, thing: Thing) -> None:
        (sprite,) = World().dye([thing])
        upright, mask = cut_out((sprite[:3] / sprite[3:].clamp_min(1e-4))[None], sprite[3:])
        both = torch.cat([upright, mask[:, None]], 1)  # (1, 4, s, s)
        turned = torch.cat([turn(both, angle, mirrored) for angle, mirrored in product(ANGLES, (False, True))])
        self.images, self.masks = turned[:, :3], turned[:, 3]  # (V, 3, s, s), (V, s, s)
        self.palette = palette(upright, mask)

    def silhouette(self, images: Tensor, masks: Tensor) -> Tensor:
        """Intersection over union of the object and the drawing, in [0, 1]."""
        found = cut_out(images, masks)[1][:, None]  # (B, 1, s, s)
        return (torch.minimum(found, self.masks).sum((2, 3)) / torch.maximum(found, self.masks).sum((2, 3))).amax(1)

    def colour(self, images: Tensor, masks: Tensor) -> Tensor:
        """What the object and the drawing share of the world's named colours: histogram intersection, in [0, 1]."""
        return torch.minimum(palette(*cut_out(images, masks)), self.palette).sum(1)

    def texture(self, images: Tensor, masks: Tensor) -> Tensor:
        """Correlation of the object's colours with the drawing's, place by place where both are, in [−1, 1].

        Each channel's mean over these places is taken off, so that a plain object of the right colours is at 0.
        """
        found, mask = cut_out(images, masks)
        weight = (mask[:, None] * self.masks)[:, :, None]  # (B, V, 1, s, s)
        first, second = (centred(x, weight) for x in (found[:, None], self.images[None]))
        scale = ((weight * first.square()).sum((2, 3, 4)) * (weight * second.square()).sum((2, 3, 4))).sqrt()
        return ((weight * first * second).sum((2, 3, 4)) / scale.clamp_min(1e-6)).amax(1)


def cut_out(images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Objects in the middle of squares, all of one area: (B, 3, s, s), and their masks (B, s, s), 0 or 1 at first."""
    masks = (masks > 0.5).float()
    size = masks.shape[-1]
    area = masks.sum((1, 2)).clamp_min(1)
    places = (torch.arange(size) + 0.5) * 2 / size - 1
    x, y = ((masks.sum(axis) * places).sum(1) / area for axis in (1, 2))
    half = area.sqrt() * 2 / size
    zero = torch.zeros_like(x)
    theta = torch.stack([torch.stack([half, zero, x], 1), torch.stack([zero, half, y], 1)], 1)  # (B, 2, 3)
    grid = F.affine_grid(theta, [len(images), 1, SIDE, SIDE], align_corners=False)
    found = F.grid_sample(torch.cat([images, masks[:, None]], 1), grid, align_corners=False)
    return found[:, :3], found[:, 3]


def turn(squares: Tensor, degrees: float, mirrored: bool) -> Tensor:
    """Squares (B, C, s, s) turned about their middle, mirrored or not."""
    angle = torch.tensor(degrees).deg2rad()
    side = -1.0 if mirrored else 1.0
    theta = torch.tensor([[side * angle.cos(), -side * angle.sin(), 0.0], [angle.sin(), angle.cos(), 0.0]])
    grid = F.affine_grid(theta.expand(len(squares), 2, 3), list(squares.shape), align_corners=False)
    return F.grid_sample(squares, grid, align_corners=False)


def palette(images: Tensor, masks: Tensor) -> Tensor:
    """Shares of the named colours inside the masks: (B, 3, s, s) and (B, s, s) -> (B, 11), each row's sum 1."""
    named = torch.tensor(list(COLOURS.values())).view(1, -1, 3, 1, 1)
    nearest = (-SHARP * (images[:, None] - named).square().sum(2)).softmax(1)  # (B, 11, s, s)
    return (nearest * masks[:, None]).sum((2, 3)) / masks.sum((1, 2)).clamp_min(1e-6)[:, None]


def centred(images: Tensor, weight: Tensor) -> Tensor:
    """Images (…, 3, s, s) without the mean of each channel over places of weight (…, 1, s, s)."""
    return images - (weight * images).sum((-2, -1), keepdim=True) / weight.sum((-2, -1), keepdim=True).clamp_min(1e-6)
