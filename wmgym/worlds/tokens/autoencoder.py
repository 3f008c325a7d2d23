"""The convolutional halves of the tokenizer, plain and conditioned on a context frame.

`Encoder` and `Decoder` are the KL-autoencoder of latent diffusion (Rombach et al., arXiv
2112.10752) with its published parameter names. Given the features of another frame, the conditioned
halves look at them by cross-attention wherever the picture is at most `max_att_resolution` wide
(iVideoGPT, arXiv 2405.15223, section 3.1), so that few tokens need to tell only what changed.

Features are the activations after every block: `[down blocks ..., mid]` of an encoder, `[mid, up
blocks ...]` of a decoder. `looks` of a conditioned half are the numbers of those it attends to.
Images `(B, C, H, W)`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_EPS = 1e-6
_CROSS_HEADS = 4
_CROSS_GROUPS = 32
"""Groups of the norms before a look at the context, whatever those of the other norms."""
_CROSS_DROPOUT = 0.1


class Resnet(nn.Module):
    """Two convolutions around a shortcut."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs, eps=_EPS)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, outputs, eps=_EPS)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """`(B, inputs, H, W)` to `(B, outputs, H, W)`."""
        h = self.conv1(_silu(self.norm1(x)))
        h = self.conv2(_silu(self.norm2(h)))
        return self.conv_shortcut(x) + h


def _silu(x: Tensor) -> Tensor:
    """SiLU of a result that nobody else holds: in place where no gradient needs it."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


class SelfAttention(nn.Module):
    """Attention of one head over the pixels of a small picture."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, width, eps=_EPS)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        """Same shape out as in."""
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(
            self.to_q(tokens)[:, None], self.to_k(tokens)[:, None], self.to_v(tokens)[:, None]
        )[:, 0]
        return x + self.to_out[0](mixed).transpose(1, 2).view_as(x)


class CrossAttention(nn.Module):
    """What a picture takes from the features of its context: `SiLU(x + attention)`.

    Args:
        width: Channels of both.
        tokens: Pixels of each.
    """

    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        if width % _CROSS_GROUPS:
            raise ValueError(
                f"block_out_channels has {width}, where the context is looked at: must be a "
                f"multiple of {_CROSS_GROUPS}"
            )
        self.kv_pos_emb = nn.Parameter(torch.zeros(tokens, width))
        self.q_pos_emb = nn.Parameter(torch.zeros(tokens, width))
        self.att = nn.MultiheadAttention(
            width, _CROSS_HEADS, dropout=_CROSS_DROPOUT, batch_first=True
        )
        self.kv_norm = nn.GroupNorm(_CROSS_GROUPS, width)
        self.q_norm = nn.GroupNorm(_CROSS_GROUPS, width)
        self.dropout = nn.Dropout(_CROSS_DROPOUT)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """`x` and `context` `(B, width, H, W)`."""
        q = self.q_norm(x).flatten(2).transpose(1, 2) + self.q_pos_emb
        kv = self.kv_norm(context).flatten(2).transpose(1, 2) + self.kv_pos_emb
        mixed = self.dropout(self.att(q, kv, kv, need_weights=False)[0])
        return F.silu(x + mixed.transpose(1, 2).reshape(x.shape))


class _Down(nn.Module):
    def __init__(self, inputs: int, outputs: int, layers: int, groups: int, *, last: bool) -> None:
        super().__init__()
        widths = [inputs, *[outputs] * layers]
        self.resnets = nn.ModuleList(Resnet(a, b, groups) for a, b in itertools.pairwise(widths))
        if not last:
            self.downsamplers = nn.ModuleList([_Downsample(outputs)])
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.last else self.downsamplers[0](x)


class _Downsample(nn.Module):
    """Halves a picture; padded at the right and the bottom only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class _Up(nn.Module):
    def __init__(self, inputs: int, outputs: int, layers: int, groups: int, *, last: bool) -> None:
        super().__init__()
        widths = [inputs, *[outputs] * (layers + 1)]
        self.resnets = nn.ModuleList(Resnet(a, b, groups) for a, b in itertools.pairwise(widths))
        if not last:
            self.upsamplers = nn.ModuleList([_Upsample(outputs)])
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.last else self.upsamplers[0](x)


class _Upsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return enlarge(x, self.conv.weight, self.conv.bias)


def enlarge(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A picture of twice the size and a 3x3 convolution of it, in 4/9 of the arithmetic.

    Doubled pixels are equal, so taps of the convolution that fall on the same one are added up
    beforehand: every second row of the result sees two rows of `x`, not three, and so for columns.

    Args:
        x: `(B, C, H, W)`.
        weight: `(D, C, 3, 3)`.
        bias: `(D,)`.

    Returns:
        `(B, D, 2 H, 2 W)`.
    """
    batch, _, height, width = x.shape
    padded = F.pad(x, (1, 1, 1, 1))
    rows = (_taps(weight, 2), _taps(weight, 2, late=True))
    last = x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    size = (batch, len(weight), 2 * height, 2 * width)
    result = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout)
    for i, row in enumerate(rows):
        for j in (0, 1):
            part = padded[:, :, i : height + i + 1, j : width + j + 1]
            result[:, :, i::2, j::2] = F.conv2d(part, _taps(row, 3, late=j == 1), bias)
    return result


def _taps(weight: Tensor, axis: int, *, late: bool = False) -> Tensor:
    """Three taps on doubled pixels as two on single ones, for the early or the late double."""
    a, b, c = weight.unbind(axis)
    return torch.stack([a + b, c] if late else [a, b + c], axis)


class _Mid(nn.Module):
    def __init__(self, width: int, groups: int, *, attention: bool) -> None:
        super().__init__()
        attentions = [SelfAttention(width, groups)] if attention else []
        self.attentions = nn.ModuleList(attentions)
        self.resnets = nn.ModuleList([Resnet(width, width, groups) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class Encoder(nn.Module):
    """Pictures to latents.

    Args:
        widths: Channels of the down blocks; all but the last halve the picture.
        layers: Resnets of a block.
        latent: Channels of the result.
        groups: Groups of the norms.
        attention: Whether the mid block attends.
        conditioned: Resolution of the pictures and the largest one that looks at a context, or
            None for an encoder without one.
    """

    def __init__(
        self,
        widths: Sequence[int],
        layers: int,
        latent: int,
        groups: int,
        *,
        attention: bool,
        conditioned: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        count = len(widths)
        inputs = [widths[0], *widths]
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            _Down(inputs[i], widths[i], layers, groups, last=i == count - 1) for i in range(count)
        )
        self.mid_block = _Mid(widths[-1], groups, attention=attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=_EPS)
        self.conv_out = nn.Conv2d(widths[-1], latent, 3, padding=1)
        self.looks: list[int] = []
        if conditioned is not None:
            resolution, largest = conditioned
            sides = [resolution >> min(i + 1, count - 1) for i in range(count)]
            self.looks = [i for i, side in enumerate(sides) if side <= largest]
            self.cross_att_blocks = nn.ModuleList(
                CrossAttention(widths[i], sides[i] ** 2) for i in self.looks
            )

    def forward(self, x: Tensor, context: Sequence[Tensor] = ()) -> tuple[Tensor, list[Tensor]]:
        """Latents and features of pictures `(B, 3, H, W)`.

        Args:
            x: The pictures.
            context: Features of the context frames, those of `looks`, in a conditioned encoder.
        """
        x = self.conv_in(x)
        features = []
        blocks = [*self.down_blocks, self.mid_block]
        for i, block in enumerate(blocks):
            x = block(x)
            if i in self.looks:
                look = self.looks.index(i)
                x = self.cross_att_blocks[look](x, context[look])
            features.append(x)
        return self.conv_out(_silu(self.conv_norm_out(x))), features


class Decoder(nn.Module):
    """Latents to pictures; arguments as in `Encoder`, `widths` from the picture inwards."""

    def __init__(
        self,
        widths: Sequence[int],
        layers: int,
        latent: int,
        groups: int,
        *,
        attention: bool,
        conditioned: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        inwards = list(reversed(widths))
        count = len(inwards)
        inputs = [inwards[0], *inwards]
        self.conv_in = nn.Conv2d(latent, inwards[0], 3, padding=1)
        self.mid_block = _Mid(inwards[0], groups, attention=attention)
        self.up_blocks = nn.ModuleList(
            _Up(inputs[i], inwards[i], layers, groups, last=i == count - 1) for i in range(count)
        )
        self.conv_norm_out = nn.GroupNorm(groups, inwards[-1], eps=_EPS)
        self.conv_out = nn.Conv2d(inwards[-1], 3, 3, padding=1)
        self.looks: list[int] = []
        if conditioned is not None:
            resolution, largest = conditioned
            least = resolution >> (count - 1)
            sides = [least, *(least << min(i + 1, count - 1) for i in range(count))]
            self.looks = [i for i, side in enumerate(sides) if i == 0 or side <= largest]
            after = [inwards[0], *inwards]
            self.cross_att_blocks = nn.ModuleList(
                CrossAttention(after[i], sides[i] ** 2) for i in self.looks
            )

    def features(
        self, latents: Tensor, context: Sequence[Tensor] = (), count: int | None = None
    ) -> list[Tensor]:
        """The first `count` features of latents `(B, latent, h, w)`; all of them by default.

        Args:
            latents: The latents.
            context: Features of the context frames' decoding, those of `looks`, in a conditioned
                decoder.
            count: How many; those further out, where the picture is large, cost the most.
        """
        x = self.conv_in(latents)
        features = []
        for i, block in enumerate([self.mid_block, *self.up_blocks][:count]):
            x = block(x)
            if i in self.looks:
                look = self.looks.index(i)
                x = self.cross_att_blocks[look](x, context[look])
            features.append(x)
        return features

    def forward(self, latents: Tensor, context: Sequence[Tensor] = ()) -> Tensor:
        """Pictures `(B, 3, H, W)`, not clipped; arguments as in `features`."""
        return self.picture(self.features(latents, context)[-1])

    def picture(self, feature: Tensor) -> Tensor:
        """Pictures `(B, 3, H, W)` of the last of all features."""
        return self.conv_out(_silu(self.conv_norm_out(feature)))
