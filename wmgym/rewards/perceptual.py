"""LPIPS: how different two images look, as a squared distance between embeddings.

LPIPS v0.1 (Zhang et al. 2018) compares unit-normalised activations of a frozen ImageNet network at
five depths `l` with learned non-negative channel weights `w_l`:

    LPIPS(x, y) = sum_l mean_{h,w} sum_c w_lc (x_lhwc - y_lhwc)^2.

Since the weights are not negative, the factor `sqrt(w_lc / (h_l w_l))` can be multiplied into the
activations, and LPIPS is then the plain squared Euclidean distance of two vectors. `LPIPS.features`
returns these vectors, so that those of a reference are computed once and selected like any rows.

Shapes: images `(N, 3, H, W)` in [0, 1], features `(N, D)` float32 (at 128 pixels `D` is 148,608 for
AlexNet and 2.0 million for VGG16), distances `(N,)` float32. Results do not depend on the batch
(see `wmgym.rewards.batches`): equal images have equal features, bit by bit.

The networks are those of Krizhevsky 2014 ("one weird trick") and Simonyan & Zisserman 2015, without
classifiers. Their weights are verified pretrained ones (`wmgym.rewards.lpips_weights`) and frozen:
buffers that are not part of the state dict. Gradients flow to the images.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wmgym.rewards.batches import in_fixed_batches
from wmgym.rewards.lpips_weights import load_weights

# Mean and deviation of ImageNet on images in [-1, 1], with the three decimals that LPIPS uses.
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
_EPSILON = 1e-10


@dataclass(frozen=True)
class Backbone:
    """A convolutional network whose activations are taken at the end of every stage.

    Attributes:
        stages: For every stage the `(stride, padding)` of its convolutions; ReLU follows each.
        pool: Kernel size and stride of the max-pooling before a stage.
        pooled: Stages that pooling precedes.
        min_size: Smallest height and width for which every stage has a pixel.
    """

    stages: tuple[tuple[tuple[int, int], ...], ...]
    pool: tuple[int, int]
    pooled: tuple[int, ...]
    min_size: int


BACKBONES = {
    "alex": Backbone(
        stages=(((4, 2),), ((1, 2),), ((1, 1),), ((1, 1),), ((1, 1),)),
        pool=(3, 2),
        pooled=(1, 2),
        min_size=31,
    ),
    "vgg": Backbone(
        stages=tuple(((1, 1),) * convs for convs in (2, 2, 3, 3, 3)),
        pool=(2, 2),
        pooled=(1, 2, 3, 4),
        min_size=16,
    ),
}
"""Architectures by net."""


class LPIPS(nn.Module):
    """The LPIPS v0.1 distance.

    Args:
        net: "alex" (ships with wmgym) or "vgg".
        weights: A safetensors file with the weights; None takes the shipped or installed ones.
        dtype: Arithmetic of the convolutions, float32 or bfloat16; the rest is float32. With
            AVX512-BF16 or a GPU, bfloat16 is faster. It moves distances above 0.1 by less than 1 %
            and distances of 0.005 by up to 15 %.
        micro_batch: Images per pass. Fewer images are filled up to it, so it is also the least work
            of one call; results of different values may differ in the last bits.

    Raises:
        ValueError: Unknown `net`, `dtype` or `micro_batch`.
        MissingWeightsError: The weights are not installed.
        DamagedWeightsError: The weights are not the known ones.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        net: str = "alex",
        *,
        weights: str | Path | None = None,
        dtype: torch.dtype = torch.float32,
        micro_batch: int = 8,
    ) -> None:
        super().__init__()
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype={dtype}: allowed are torch.float32 and torch.bfloat16")
        if micro_batch < 1:
            raise ValueError(f"micro_batch={micro_batch}: allowed are integers >= 1")
        state = load_weights(net, weights)
        self.net = net
        self.dtype = dtype
        self.micro_batch = micro_batch
        self.backbone = BACKBONES[net]
        for name, tensor in state.items():
            if name.startswith("convs."):
                tensor = tensor.to(dtype)
            if name.endswith(".weight"):
                tensor = tensor.contiguous(memory_format=torch.channels_last)
            self.register_buffer(_buffer(name), tensor, persistent=False)
        # (2 x - 1 - shift) / scale as x * scale + shift
        scale = torch.tensor(_SCALE).view(1, 3, 1, 1)
        shift = -(1.0 + torch.tensor(_SHIFT).view(1, 3, 1, 1)) / scale
        self.register_buffer("shift", shift, persistent=False)
        self.register_buffer("scale", 2.0 / scale, persistent=False)

    def features(self, images: Tensor) -> Tensor:
        """Embeds images `(N, 3, H, W)` in [0, 1] as `(N, D)` float32.

        Raises:
            ValueError: Wrong shape or dtype, no images, or images too small for the network.
        """
        self._check(images)
        return in_fixed_batches(self._embed, self.micro_batch, images)

    def distance(self, features_x: Tensor, features_y: Tensor) -> Tensor:
        """Distances `(N,)` between features `(N, D)` row by row; 0 for equal rows.

        Raises:
            ValueError: The shapes differ.
        """
        if features_x.shape != features_y.shape:
            raise ValueError(
                f"features have shapes {tuple(features_x.shape)} and {tuple(features_y.shape)}: "
                "they must be equal (select rows with features.index_select(0, index))"
            )
        return in_fixed_batches(_squared_distance, self.micro_batch, features_x, features_y)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distances `(N,)` between images `(N, 3, H, W)` in [0, 1].

        Raises:
            ValueError: As in `features`, or the shapes differ.
        """
        self._check(x)
        self._check(y)
        if x.shape != y.shape:
            raise ValueError(f"images have shapes {tuple(x.shape)} and {tuple(y.shape)}")
        return in_fixed_batches(
            lambda a, b: _squared_distance(self._embed(a), self._embed(b)), self.micro_batch, x, y
        )

    def _embed(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            x = torch.addcmul(self.shift, images.float(), self.scale)
            x = x.to(self.dtype, memory_format=torch.channels_last)
            embeddings = []
            conv = 0
            for number, stage in enumerate(self.backbone.stages):
                if number in self.backbone.pooled:
                    x = F.max_pool2d(x, *self.backbone.pool)
                for stride, padding in stage:
                    weight = self.get_buffer(_buffer(f"convs.{conv}.weight"))
                    bias = self.get_buffer(_buffer(f"convs.{conv}.bias"))
                    x = F.conv2d(x, weight, bias, stride, padding).relu_()
                    conv += 1
                head = self.get_buffer(_buffer(f"heads.{number}"))
                embeddings.append(_normalise(x, head))
            return torch.cat(embeddings, dim=1)

    def _check(self, images: Tensor) -> None:
        least = self.backbone.min_size
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                f"images are {tuple(images.shape)} {images.dtype}: expected (N, 3, H, W) floating "
                "point in [0, 1]"
            )
        if min(images.shape[2:]) < least:
            raise ValueError(
                f"images have {tuple(images.shape[2:])} pixels: net={self.net!r} needs at least "
                f"({least}, {least})"
            )


def _buffer(name: str) -> str:
    return name.replace(".", "_")


def _normalise(activations: Tensor, head: Tensor) -> Tensor:
    """Unit channel vectors of `(N, C, h, w)`, scaled by the head, as rows `(N, h * w * C)`."""
    x = activations.permute(0, 2, 3, 1).flatten(1, 2).float()
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    unit = x / (norm + _EPSILON)
    return unit.mul_((head / x.shape[1]).sqrt()).flatten(1)


def _squared_distance(x: Tensor, y: Tensor) -> Tensor:
    # Summed in two steps: one long sum may be split among threads when there is a single row.
    return (x - y).square().unflatten(1, (-1, 64)).sum(-1).sum(-1)
