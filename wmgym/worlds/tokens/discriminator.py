"""What tells drawn from recorded pictures while the tokenizer is trained.

A tower of `depth` convolutions of stride 2 under spectral norm (Miyato et al., arXiv 1802.05957),
with instance norm and leaky ReLU, then one logit for every patch of the picture, as in the training
of Paella (Rampas et al., arXiv 2211.07292).

Departures: logits are not squashed into (0, 1), where the hinge loss would have no corner to reach;
and spectral norms are estimated once an optimizer step (`update_spectral_norms`), not at every
call, so that the number of calls, and with it the number of processes, changes nothing.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Shape of a `Discriminator`.

    Attributes:
        width: Channels of the innermost convolutions; those further out have down to an eighth.
        depth: Convolutions, each of which halves the picture.
    """

    width: int = 512
    depth: int = 6

    def __post_init__(self) -> None:
        if self.width < 8 or self.width % 8 or self.depth < 1:
            raise ValueError(
                f"width={self.width}, depth={self.depth}: allowed are multiples of 8, and >= 1"
            )


class Discriminator(nn.Module):
    """Logits of pictures; see the module docstring.

    Args:
        config: Its shape.
        resolution: Height and width of the pictures, pixels.

    Raises:
        ValueError: The pictures are too small for that many halvings.
    """

    def __init__(self, config: DiscriminatorConfig, resolution: int) -> None:
        super().__init__()
        if resolution >> config.depth < 2:
            raise ValueError(
                f"depth={config.depth} halvings leave less than 2 pixels of {resolution}; allowed "
                f"are depths up to {max(0, resolution.bit_length() - 2)}"
            )
        widths = [config.width // 8 << min(i, 3) for i in range(config.depth)]
        layers: list[nn.Module] = []
        for i, (inputs, outputs) in enumerate(itertools.pairwise([3, *widths])):
            layers.append(spectral_norm(nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)))
            if i > 0:
                layers.append(nn.InstanceNorm2d(outputs))
            layers.append(nn.LeakyReLU(0.2))
        self.tower = nn.Sequential(*layers)
        self.head = nn.Conv2d(widths[-1], 1, 1)
        self.eval()

    def forward(self, pictures: Tensor) -> Tensor:
        """Logits `(N, 1, h, w)` of pictures `(N, 3, H, W)`, large for recorded ones."""
        return self.head(self.tower(pictures))

    @torch.no_grad()
    def update_spectral_norms(self) -> None:
        """Improves the estimates of the spectral norms by one power iteration."""
        self.train()
        for layer in self.tower:
            _ = getattr(layer, "weight", None)  # computing the weight is what iterates
        self.eval()
