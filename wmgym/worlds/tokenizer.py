"""A frame as a few numbers, given a frame that came before it.

Most of a robot's camera picture is where it was a moment ago. The tokenizer therefore describes a
frame `y` by `S` short vectors `z = encode(y | x)` relative to a context frame `x`, and redraws it
as `decode(z, p | x)`, where `p` is the arm's pose, which a robot knows: for every pixel a place in
the context frame to copy from (a flow), a colour of its own, and three weights that choose between
staying, copying and painting,

    y = w_stay * x + w_move * warp(x, flow) + w_paint * colour,   w = softmax(logits).

Copied pixels stay sharp, which a purely painted picture of this size does not (compare the dynamic
neural advection of Finn et al. 2016 and the context-conditioned tokenizer of iVideoGPT, Wu et al.
2024). The latent is continuous; the published discrete tokenizer is another family.

The decoder is told the pose, and all latents at once, by a vector that modulates every layer: with
cross-attention alone it learned to ignore them and drew the mean of all motions.

Shapes: frames `(B, 3, H, W)` in [0, 1], fine tokens `(B, (H/p)^2, D/2)`, coarse tokens
`(B, (H/2p)^2, D)`, latents `(B, S, Z)`, poses `(B, 16)` from `LatentDynamics.pose`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wmgym.spaces import PROPRIO_DIM
from wmgym.worlds.layers import (
    GridBlock,
    TokenBlock,
    from_patches,
    merge,
    split,
    to_patches,
    warp,
)

_STAY, _MOVE, _PAINT = 0, 1, 2
_AT_FIRST = {_STAY: 0.0, _MOVE: 2.0, _PAINT: -1.0}
_FLOW_UNIT = 8.0
_CHANNELS = 8


@dataclass(frozen=True)
class TokenizerConfig:
    """Shape of a `ContextTokenizer`.

    Attributes:
        image_size: Height and width of a frame, pixels.
        patch: Side of a fine token, pixels; a coarse token is twice that.
        width: Width `D` of coarse tokens; fine ones have half.
        heads: Attention heads.
        encoder_layers: Attention layers over the coarse grid of a frame.
        summary_layers: Attention layers from latents to a frame and its context.
        decoder_layers: Attention layers over the coarse grid when drawing.
        fine_layers: Convolution layers over the fine grid, in encoder and decoder each.
        slots: Number `S` of latent vectors of a frame.
        latent: Width `Z` of a latent vector.
    """

    image_size: int = 128
    patch: int = 8
    width: int = 256
    heads: int = 4
    encoder_layers: int = 3
    summary_layers: int = 1
    decoder_layers: int = 3
    fine_layers: int = 2
    slots: int = 8
    latent: int = 64

    def __post_init__(self) -> None:
        if self.image_size % (2 * self.patch):
            raise ValueError(
                f"image_size={self.image_size} is not a multiple of twice patch={self.patch}"
            )

    @property
    def side(self) -> int:
        """Coarse tokens along one side of a frame."""
        return self.image_size // (2 * self.patch)


@dataclass(frozen=True)
class Features:
    """What the encoder sees in frames: `fine` `(B, 4 N, D/2)` and `coarse` `(B, N, D)`."""

    fine: Tensor
    coarse: Tensor

    def repeat(self, times: int) -> Features:
        """Every row `times` times in a row."""
        return Features(
            self.fine.repeat_interleave(times, 0), self.coarse.repeat_interleave(times, 0)
        )


class ContextTokenizer(nn.Module):
    """Encodes and decodes frames relative to a context frame; see the module docstring."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        width, fine, area = config.width, config.width // 2, config.patch**2
        self.embed = nn.Linear(3 * area, fine)
        self.fine_position = nn.Parameter(torch.randn(4 * config.side**2, fine) * 0.2)
        self.fine_encoder = nn.ModuleList(GridBlock(fine) for _ in range(config.fine_layers))
        self.coarsen = nn.Linear(4 * fine, width)
        self.coarse_position = nn.Parameter(torch.randn(config.side**2, width) * 0.2)
        self.encoder = nn.ModuleList(
            TokenBlock(width, config.heads, cross=False) for _ in range(config.encoder_layers)
        )
        self.encoder_norm = nn.LayerNorm(width)

        self.slots = nn.Parameter(torch.randn(config.slots, width) * 0.5)
        self.which_frame = nn.Parameter(torch.randn(2, width) * 0.1)
        self.summary = nn.ModuleList(
            TokenBlock(width, config.heads, cross=True) for _ in range(config.summary_layers)
        )
        self.to_latent = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, config.latent))

        self.from_latent = nn.Linear(config.latent, width)
        self.condition = nn.Linear(config.slots * config.latent, width)
        self.pose = nn.Sequential(
            nn.Linear(2 * PROPRIO_DIM, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.decoder = nn.ModuleList(
            TokenBlock(width, config.heads, cross=True, conditioned=True)
            for _ in range(config.decoder_layers)
        )
        self.refine = nn.Linear(width, 4 * fine)
        self.fine_decoder = nn.ModuleList(
            GridBlock(fine, condition=width) for _ in range(config.fine_layers)
        )
        self.draw_norm = nn.LayerNorm(fine)
        self.draw = nn.Linear(fine, _CHANNELS * area)
        self._start_by_copying()

    def _start_by_copying(self) -> None:
        """An untrained decoder nearly returns the context frame, by moving it nowhere.

        Copying is the baseline, and by this way to it the flows learn from the first step on.
        """
        nn.init.normal_(self.draw.weight, std=0.003)
        nn.init.zeros_(self.draw.bias)
        with torch.no_grad():
            for channel, logit in _AT_FIRST.items():
                self.draw.bias.view(_CHANNELS, -1)[channel] = logit

    def look(self, frames: Tensor) -> Features:
        """Features of frames `(B, 3, H, W)`, of context frames and of others alike."""
        fine = self.embed(to_patches(frames * 2 - 1, self.config.patch)) + self.fine_position
        for block in self.fine_encoder:
            fine = block(fine)
        coarse = self.coarsen(merge(fine)) + self.coarse_position
        for block in self.encoder:
            coarse = block(coarse)
        return Features(fine, self.encoder_norm(coarse))

    def encode(self, frame: Features, context: Features) -> Tensor:
        """Latents `(B, S, Z)` of a frame relative to its context."""
        memory = torch.cat(
            [context.coarse + self.which_frame[0], frame.coarse + self.which_frame[1]], dim=1
        )
        x = self.slots.expand(len(memory), -1, -1)
        for block in self.summary:
            x = block(x, memory)
        return self.to_latent(x)

    def decode(
        self, latents: Tensor, pose: Tensor, context: Features, context_frames: Tensor
    ) -> Tensor:
        """Draws frames.

        Args:
            latents: `(B, S, Z)`.
            pose: `(B, 16)`, where the arm was in the context frame and where it is now.
            context: Features of the context frames.
            context_frames: `(B, 3, H, W)` in [0, 1].

        Returns:
            `(B, 3, H, W)` float32 in [0, 1].
        """
        memory = self.from_latent(latents)
        condition = F.silu(self.condition(latents.flatten(1)) + self.pose(pose))
        x = context.coarse
        for block in self.decoder:
            x = block(x, memory, condition=condition)
        fine = split(self.refine(x)) + context.fine
        for block in self.fine_decoder:
            fine = block(fine, condition)
        drawn = from_patches(self.draw(self.draw_norm(fine)), self.config.patch).float()
        with torch.autocast(drawn.device.type, enabled=False):
            weights = drawn[:, :3].softmax(dim=1)
            moved = warp(context_frames.float(), drawn[:, 3:5] * _FLOW_UNIT)
            painted = torch.sigmoid(drawn[:, 5:])
            return (
                weights[:, _STAY, None] * context_frames
                + weights[:, _MOVE, None] * moved
                + weights[:, _PAINT, None] * painted
            )


def latent_distance(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean squared distance of latents, the target taken as given."""
    return F.mse_loss(predicted.float(), target.detach().float())
