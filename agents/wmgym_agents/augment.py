"""What pictures go through before a policy sees them, as in VLA-RFT and OpenVLA.

In training a random crop of 90 % of the area and random colours, otherwise the crop in the middle.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from wmgym.colour import contrasted, saturated, turned_hue
from wmgym_agents.randomness import Source, rows

CROP_AREA = 0.9
BRIGHTNESS = 0.2
CONTRAST = 0.2
SATURATION = 0.2
HUE = 0.05


def center_crop(pixels: Tensor) -> Tensor:
    """The middle 90 % of the area of pictures `(B, 3, H, W)`, at their size."""
    return _crop(pixels, pixels.new_zeros(len(pixels), 2))


def random_view(pixels: Tensor, generator: Source) -> Tensor:
    """Randomly cropped and coloured pictures `(B, 3, H, W)` in [0, 1].

    Args:
        pixels: `(B, 3, H, W)` in [0, 1].
        generator: Source of the randomness of every picture.
    """
    draws = (rows(torch.rand, len(pixels), (6,), generator) * 2 - 1).to(pixels)
    shift, bright, contrast, saturation, hue = draws.split([2, 1, 1, 1, 1], dim=1)
    x = _crop(pixels, shift)
    x = x + BRIGHTNESS * bright[..., None, None]
    x = contrasted(x, 1 + CONTRAST * contrast[..., None, None])
    x = saturated(x, 1 + SATURATION * saturation[..., None, None])
    return turned_hue(x, 2 * math.pi * HUE * hue[:, 0]).clamp(0, 1)


def _crop(pixels: Tensor, shift: Tensor) -> Tensor:
    """Crops of 90 % of the area; `shift` `(B, 2)` in [-1, 1] moves them from edge to edge."""
    side = math.sqrt(CROP_AREA)
    theta = pixels.new_zeros(len(pixels), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = side
    theta[:, :, 2] = shift * (1 - side)
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
