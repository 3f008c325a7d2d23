"""Random crops and colours of clips, the same for all frames of a clip.

Scales and angles are those of the published recipe. Departures: hue turns in YIQ instead of HSV
space, colours change in one fixed order, and a crop that is too wide for the picture is cut to its
width instead of drawn again.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from wmgym.colour import contrasted, saturated, turned_hue

COLOUR = 0.1
"""Largest relative change of brightness, contrast and saturation."""
HUE = 0.05
"""Largest turn of the hue, in turns."""
AREA = (0.8, 1.0)
"""Share of the picture's area in a crop."""
RATIO = (1.0, 1.4)
"""Width over height of a crop."""


def random_view(clip: Tensor, rng: np.random.Generator) -> Tensor:
    """A clip `(T, 3, H, W)` in [0, 1], cropped and coloured at random, of the same shape."""
    height, width = clip.shape[2:]
    area, ratio = rng.uniform(*AREA), math.exp(rng.uniform(*np.log(RATIO).tolist()))
    across = min(width, round(width * math.sqrt(area * ratio)))
    down = min(height, round(height * math.sqrt(area / ratio)))
    left, top = rng.integers(width - across + 1), rng.integers(height - down + 1)
    x = clip[..., top : top + down, left : left + across]
    x = F.interpolate(x, (height, width), mode="bilinear", antialias=True)
    brightness, contrast, saturation = clip.new_tensor(1 + COLOUR * rng.uniform(-1, 1, 3))
    angle = 2 * math.pi * HUE * rng.uniform(-1, 1)
    x = saturated(contrasted(x * brightness, contrast), saturation)
    return turned_hue(x, torch.full((len(x),), angle, device=x.device)).clamp(0, 1)
