"""Distances between images that reports of a world quote: MSE, PSNR and SSIM.

Images are `(N, 3, H, W)` float in [0, 1], results `(N,)` float32, one per image. LPIPS is
`wmgym.rewards.perceptual.LPIPS`.

SSIM is that of Wang et al. 2004: a Gaussian window of 11 x 11 pixels and standard deviation 1.5,
population statistics, `K` = (0.01, 0.03), only windows that lie inside the image, averaged over
windows and colours. It equals scikit-image's `structural_similarity(..., gaussian_weights=True,
sigma=1.5, use_sample_covariance=False, data_range=1)`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_WINDOW = 11
_SIGMA = 1.5
_C1 = 0.01**2
_C2 = 0.03**2


def mse(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared difference of images `(N, 3, H, W)` in [0, 1], `(N,)`.

    Raises:
        ValueError: Wrong or different shapes.
    """
    _check(x, y)
    return (x.float() - y.float()).square().mean((1, 2, 3))


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB for a peak of 1, `(N,)`; infinite for equal images.

    Raises:
        ValueError: Wrong or different shapes.
    """
    return -10.0 * torch.log10(mse(x, y))


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity `(N,)` in [-1, 1]; 1 for equal images.

    Raises:
        ValueError: Wrong or different shapes, or images of less than 11 x 11 pixels.
    """
    _check(x, y)
    if min(x.shape[2:]) < _WINDOW:
        raise ValueError(f"images have {tuple(x.shape[2:])} pixels: SSIM needs at least (11, 11)")
    a, b = x.float(), y.float()
    maps = _blur(torch.cat([a, b, a * a, b * b, a * b], dim=1))
    mean_a, mean_b, mean_aa, mean_bb, mean_ab = maps.chunk(5, dim=1)
    variances = (mean_aa - mean_a * mean_a) + (mean_bb - mean_b * mean_b)
    covariance = mean_ab - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + _C1) / (mean_a * mean_a + mean_b * mean_b + _C1)
    structure = (2 * covariance + _C2) / (variances + _C2)
    return (luminance * structure).mean((1, 2, 3))


def _blur(x: Tensor) -> Tensor:
    """Gaussian averages over the windows inside images `(N, C, H, W)`, channel by channel."""
    channels = x.shape[1]
    offsets = torch.arange(_WINDOW, dtype=torch.float32, device=x.device) - _WINDOW // 2
    kernel = torch.exp(-0.5 * (offsets / _SIGMA).square())
    kernel = (kernel / kernel.sum()).repeat(channels, 1)
    columns = F.conv2d(x, kernel[:, None, :, None], groups=channels)
    return F.conv2d(columns, kernel[:, None, None, :], groups=channels)


def _check(x: Tensor, y: Tensor) -> None:
    if x.ndim != 4 or x.shape[1] != 3 or x.shape != y.shape:
        raise ValueError(
            f"images have shapes {tuple(x.shape)} and {tuple(y.shape)}: expected (N, 3, H, W) twice"
        )
