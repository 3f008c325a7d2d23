"""Changes of colour that training shows its pictures in, on `(B, 3, H, W)` in [0, 1]."""

from __future__ import annotations

import torch
from torch import Tensor

_GREY = (0.299, 0.587, 0.114)
_YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))


def contrasted(x: Tensor, factor: Tensor) -> Tensor:
    """Pictures whose distance from their mean is scaled by factors `(B, 1, 1, 1)`."""
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    return mean + (x - mean) * factor


def saturated(x: Tensor, factor: Tensor) -> Tensor:
    """Pictures whose distance from grey is scaled by factors `(B, 1, 1, 1)`."""
    grey = torch.einsum("bchw,c->bhw", x, x.new_tensor(_GREY))[:, None]
    return grey + (x - grey) * factor


def turned_hue(x: Tensor, angle: Tensor) -> Tensor:
    """Pictures whose chrominance is turned by angles `(B,)`, rad, in YIQ space."""
    to_yiq = x.new_tensor(_YIQ)
    cos, sin = angle.cos(), angle.sin()
    turn = torch.zeros(len(x), 3, 3, dtype=x.dtype, device=x.device)
    turn[:, 0, 0] = 1
    turn[:, 1, 1], turn[:, 1, 2], turn[:, 2, 1], turn[:, 2, 2] = cos, -sin, sin, cos
    return torch.einsum("bij,bjhw->bihw", to_yiq.inverse() @ turn @ to_yiq, x)
