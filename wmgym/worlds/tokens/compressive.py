"""The published tokenizer: 1,024 tokens for a context frame, 64 for what changes in every other.

    context frame  -> encoder                  -> 1x1 convolution -> FSQ    one token a latent pixel
    later frame    -> encoder given the context -> 4x4 patches, linear -> FSQ   one token a patch

and back: the context's tokens give the features that every later frame's decoder looks at. Later
frames are independent of each other given the context (iVideoGPT, arXiv 2405.15223, section 3.1;
FSQ instead of a codebook as in VLA-RFT's release).

What all frames of a clip share is computed once: `encode_context` returns what the encoder of later
frames looks at, `context_features` what their decoder does, only the innermost of the context's.

Shapes: frames `(B, T, 3, H, W)` float in [0, 1], frame 0 the context; context tokens `(B, 1, N)`,
dynamics tokens `(B, T - 1, n)`, both without offsets of a vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wmgym.checkpoints import save_model
from wmgym.settings import check_numbers
from wmgym.worlds.tokens.autoencoder import Decoder, Encoder
from wmgym.worlds.tokens.folders import Described, read_model
from wmgym.worlds.tokens.fsq import FSQ, LEVELS
from wmgym.worlds.tokens.vocabulary import Vocabulary, as_integers

WEIGHTS = "diffusion_pytorch_model.safetensors"
_SLACK = 1e-3  # resizing may leave 0 ... 1 by rounding
_WRITTEN_AS = {"_diffusers_version": "0.33.1"}


@dataclass(frozen=True)
class CompressiveTokenizerConfig(Described):
    """Shape of a `CompressiveTokenizer`; names and defaults are those of the published config.

    Attributes:
        in_channels: Channels of a frame.
        out_channels: The same.
        down_block_types: Kinds of the encoder's blocks, all "DownEncoderBlock2D".
        up_block_types: Kinds of the decoder's blocks, all "UpDecoderBlock2D".
        block_out_channels: Their widths, from the picture inwards; all but the last block halve it.
        layers_per_block: Resnets of a block (the decoder has one more).
        act_fn: Activation, "silu".
        latent_channels: Channels of a latent pixel.
        norm_num_groups: Groups of the norms.
        norm_type: Kind of the norms, "group".
        mid_block_add_attention: Whether the halves without context attend to themselves; those with
            context always do.
        vq_fsq_levels: Key in `LEVELS` for context tokens.
        dyn_fsq_levels: The same for dynamics tokens.
        context_length: Context frames, 1.
        max_att_resolution: Widest picture at which the context is looked at.
        resolution: Height and width of a frame.
        patch_size: Side of a dynamics token in latent pixels.
        sample_size: Not used, kept for other readers.
        scaling_factor: Not used, kept for other readers.
        force_upcast: Not used, kept for other readers.
        lookup_from_codebook: Not used, kept for other readers.
    """

    kind = ("_class_name", "CompressiveVQModelFSQ")

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",) * 4
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",) * 4
    block_out_channels: tuple[int, ...] = (128, 256, 256, 512)
    layers_per_block: int = 2
    act_fn: str = "silu"
    latent_channels: int = 64
    norm_num_groups: int = 32
    norm_type: str = "group"
    mid_block_add_attention: bool = False
    vq_fsq_levels: int = 12
    dyn_fsq_levels: int = 12
    context_length: int = 1
    max_att_resolution: int = 32
    resolution: int = 256
    patch_size: int = 4
    sample_size: int = 32
    scaling_factor: float = 0.18215
    force_upcast: bool = True
    lookup_from_codebook: bool = True

    def __post_init__(self) -> None:
        check_numbers(self, ">= 1", "layers_per_block", "latent_channels", "norm_num_groups")
        check_numbers(self, ">= 1", "max_att_resolution", "resolution", "patch_size")
        count = len(self.block_out_channels)
        self.require(in_channels=3, out_channels=3, act_fn="silu", norm_type="group")
        self.require(context_length=1)
        self.require(down_block_types=("DownEncoderBlock2D",) * count)
        self.require(up_block_types=("UpDecoderBlock2D",) * count)
        if self.vq_fsq_levels not in LEVELS or self.dyn_fsq_levels not in LEVELS:
            raise ValueError(
                f"vq_fsq_levels={self.vq_fsq_levels}, dyn_fsq_levels={self.dyn_fsq_levels}: "
                f"allowed are {sorted(LEVELS)}"
            )
        if not count or any(w < 1 or w % self.norm_num_groups for w in self.block_out_channels):
            raise ValueError(
                f"block_out_channels={self.block_out_channels}: expected positive multiples of "
                f"norm_num_groups={self.norm_num_groups}"
            )
        unit = self.patch_size << (count - 1)
        if self.resolution % unit:
            raise ValueError(
                f"resolution={self.resolution} is not a multiple of {unit}: "
                f"patch_size={self.patch_size} at {count - 1} halvings"
            )

    @property
    def side(self) -> int:
        """Latent pixels along one side of a frame."""
        return self.resolution >> (len(self.block_out_channels) - 1)

    @property
    def context_tokens(self) -> int:
        """Tokens `N` of a context frame."""
        return self.side**2

    @property
    def dynamics_tokens(self) -> int:
        """Tokens `n` of every other frame."""
        return (self.side // self.patch_size) ** 2


class CompressiveTokenizer(nn.Module):
    """Frames to tokens and back; see the module docstring.

    It starts in evaluation mode: in training mode dropout makes tokens random.

    Args:
        config: Its shape, or the JSON object of a `config.json` with it.
    """

    def __init__(self, config: CompressiveTokenizerConfig | Mapping[str, Any]) -> None:
        super().__init__()
        if not isinstance(config, CompressiveTokenizerConfig):
            config = CompressiveTokenizerConfig.of(dict(config))
        self.config = config
        c, widths = config, config.block_out_channels
        shape = (widths, c.layers_per_block, c.latent_channels, c.norm_num_groups)
        seen = (c.resolution, c.max_att_resolution)
        plain = c.mid_block_add_attention
        self.encoder = Encoder(*shape, attention=plain)
        self.decoder = Decoder(*shape, attention=plain)
        self.cond_encoder = Encoder(*shape, attention=True, conditioned=seen)
        self.cond_decoder = Decoder(*shape, attention=True, conditioned=seen)
        self.fsq, self.dynamics_fsq = FSQ(LEVELS[c.vq_fsq_levels]), FSQ(LEVELS[c.dyn_fsq_levels])
        code, dynamics_code = len(self.fsq.levels), len(self.dynamics_fsq.levels)
        patch = c.latent_channels * c.patch_size**2
        self.quant_conv = nn.Conv2d(c.latent_channels, code, 1)
        self.post_quant_conv = nn.Conv2d(code, c.latent_channels, 1)
        self.quant_linear = nn.Linear(patch, dynamics_code)
        self.post_quant_linear = nn.Linear(dynamics_code, patch)
        self.eval()

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> CompressiveTokenizer:
        """Reads a folder of `config.json` and `diffusion_pytorch_model.safetensors`.

        Args:
            folder: A folder, or the id of a Hugging Face repository.

        Raises:
            CheckpointError: Something is missing, damaged, or does not fit.
        """
        return read_model(cls, CompressiveTokenizerConfig, folder, WEIGHTS)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes such a folder.

        Raises:
            FloatingPointError: A weight is NaN or infinite; nothing is written.
        """
        described = self.config.describe() | dict([self.config.kind]) | _WRITTEN_AS
        save_model(Path(folder), self, described, weights=WEIGHTS)

    def vocabulary(self, bins: int) -> Vocabulary:
        """What tokens of this tokenizer, and of actions in `bins` bins, mean."""
        return Vocabulary(
            dynamics=self.dynamics_fsq.codes,
            context=self.fsq.codes,
            bins=bins,
            context_tokens=self.config.context_tokens,
            dynamics_tokens=self.config.dynamics_tokens,
        )

    def encode(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of clips.

        Args:
            frames: `(B, T, 3, H, W)` in [0, 1], T >= 1; the first one is the context.

        Returns:
            Context tokens `(B, 1, N)` and dynamics tokens `(B, T - 1, n)`, int64.

        Raises:
            TypeError: No tensor of floats.
            ValueError: Frames of another shape or range, or NaN.
        """
        frames = self._checked(frames)
        low, high = (float(bound) for bound in frames.aminmax())
        if not (low >= -_SLACK and high <= 1 + _SLACK):
            raise ValueError(
                f"frames are {low:.3g} ... {high:.3g}, expected 0 ... 1: divide bytes by 255, clip "
                "what was decoded"
            )
        tokens, features = self.encode_context(frames[:, 0])
        later = frames[:, 1:]
        count = later.shape[1]
        repeated = [f.repeat_interleave(count, 0) for f in features]
        dynamics = self.encode_dynamics(later.flatten(0, 1), repeated) if count else tokens[:0]
        return tokens[:, None], dynamics.view(len(frames), count, self.config.dynamics_tokens)

    def decode(self, context_tokens: Tensor, dynamics_tokens: Tensor) -> Tensor:
        """Clips of tokens.

        Args:
            context_tokens: `(B, 1, N)`.
            dynamics_tokens: `(B, T - 1, n)`.

        Returns:
            `(B, T, 3, H, W)` float, the context first, not clipped to [0, 1].

        Raises:
            TypeError: No tensors of integers.
            ValueError: Tokens of another shape, or outside the codes.
        """
        context_tokens, dynamics_tokens = self._codes(context_tokens, dynamics_tokens)
        count = dynamics_tokens.shape[1]
        shown = self.decoder.features(self._latents(context_tokens[:, 0]))
        first = self.decoder.picture(shown[-1])[:, None]
        looks = [shown[i].repeat_interleave(count, 0) for i in self.cond_decoder.looks]
        later = self.draw(dynamics_tokens.flatten(0, 1), looks) if count else first[:0]
        return torch.cat([first, later.view(len(first), count, *first.shape[2:])], 1)

    def reconstruct(self, frames: Tensor) -> Tensor:
        """Frames as their tokens tell them: `encode` and `decode` in one, with a gradient.

        Args:
            frames: `(B, T, 3, H, W)` in [0, 1], T >= 2; the first one is the context.

        Returns:
            The same shape, not clipped; the gradient passes straight through the rounding.

        Raises:
            TypeError: No tensor of floats.
            ValueError: Frames of another shape.
        """
        frames = self._checked(frames)
        later, count = frames[:, 1:].flatten(0, 1), frames.shape[1] - 1
        latents, seen = self.encoder(frames[:, 0])
        codes = self.fsq.quantize(self.quant_conv(latents).movedim(1, -1)).movedim(-1, 1)
        looks = [seen[i].repeat_interleave(count, 0) for i in self.cond_encoder.looks]
        dynamics = self.dynamics_fsq.quantize(self.dynamics_latents(later, looks))
        shown = self.decoder.features(self.post_quant_conv(codes.to(latents.dtype)))
        looks = [shown[i].repeat_interleave(count, 0) for i in self.cond_decoder.looks]
        drawn = self._drawn(dynamics.to(latents.dtype), looks)
        first = self.decoder.picture(shown[-1])
        return torch.cat([first[:, None], drawn.unflatten(0, (len(frames), count))], 1)

    def encode_context(self, frames: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Context tokens `(B, N)` of frames `(B, 3, H, W)`, and the features later frames need."""
        latents, features = self.encoder(frames)
        tokens = self.fsq.encode(self.quant_conv(latents).movedim(1, -1)).flatten(1)
        return tokens, [features[i] for i in self.cond_encoder.looks]

    def encode_dynamics(self, frames: Tensor, context: Sequence[Tensor]) -> Tensor:
        """Dynamics tokens `(B, n)` of frames `(B, 3, H, W)`, given features of `encode_context`."""
        return self.dynamics_fsq.encode(self.dynamics_latents(frames, context))

    def dynamics_latents(self, frames: Tensor, context: Sequence[Tensor]) -> Tensor:
        """The vectors `(B, n, D)` that are rounded to dynamics tokens."""
        latents, _ = self.cond_encoder(frames, context)
        return self.quant_linear(_patches(latents, self.config.patch_size))

    def context_features(self, context_tokens: Tensor) -> list[Tensor]:
        """Features `(B, C, h, w)` of context tokens `(B, N)` that later frames are drawn on."""
        looks = self.cond_decoder.looks
        features = self.decoder.features(self._latents(context_tokens), count=max(looks) + 1)
        return [features[i] for i in looks]

    def draw(self, dynamics_tokens: Tensor, context: Sequence[Tensor]) -> Tensor:
        """Frames `(B, 3, H, W)` of dynamics tokens `(B, n)` on `context_features`, not clipped."""
        codes = self.dynamics_fsq.decode(dynamics_tokens).to(self.post_quant_linear.weight.dtype)
        return self._drawn(codes, context)

    def _drawn(self, codes: Tensor, context: Sequence[Tensor]) -> Tensor:
        """Frames `(B, 3, H, W)` of rounded dynamics latents `(B, n, D)`."""
        side, patch = self.config.side, self.config.patch_size
        return self.cond_decoder(_unpatched(self.post_quant_linear(codes), side, patch), context)

    def _latents(self, context_tokens: Tensor) -> Tensor:
        side = self.config.side
        codes = self.fsq.decode(context_tokens).to(self.post_quant_conv.weight.dtype)
        return self.post_quant_conv(codes.unflatten(1, (side, side)).movedim(-1, 1))

    def _checked(self, frames: Tensor) -> Tensor:
        """Frames in the arithmetic of the weights."""
        if not isinstance(frames, Tensor) or not frames.is_floating_point():
            given = frames.dtype if isinstance(frames, Tensor) else type(frames).__name__
            raise TypeError(f"frames are {given}, expected floats: frames.float() / 255 of bytes")
        side = self.config.resolution
        if frames.ndim != 5 or 0 in frames.shape or frames.shape[2:] != (3, side, side):
            raise ValueError(
                f"frames have shape {tuple(frames.shape)}, expected (B, T, 3, {side}, {side}), "
                "B >= 1 and T >= 1"
            )
        return frames.to(self.quant_conv.weight.dtype)

    def _codes(self, context_tokens: Tensor, dynamics_tokens: Tensor) -> list[Tensor]:
        """Tokens of clips as int64; see `decode` for what it raises."""
        found = []
        for name, tokens, each, codes in (
            ("context", context_tokens, self.config.context_tokens, self.fsq.codes),
            ("dynamics", dynamics_tokens, self.config.dynamics_tokens, self.dynamics_fsq.codes),
        ):
            tokens = as_integers(f"{name} tokens", tokens)
            if (
                tokens.ndim != 3
                or not len(tokens)
                or len(tokens) != len(context_tokens)
                or tokens.shape[2] != each
            ):
                raise ValueError(
                    f"{name} tokens have shape {tuple(tokens.shape)}, expected "
                    f"({len(context_tokens) or 'B >= 1'}, T, {each})"
                )
            if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < codes:
                raise ValueError(
                    f"{name} tokens are {int(tokens.min())} ... {int(tokens.max())}, allowed "
                    f"0 ... {codes - 1}, without offset"
                )
            found.append(tokens)
        if context_tokens.shape[1] != 1:
            raise ValueError(f"{context_tokens.shape[1]} context frames, expected 1")
        return found


def _patches(latents: Tensor, patch: int) -> Tensor:
    """`(B, C, h, w)` to `(B, n, p p C)`: row in the patch, column in it, channel."""
    batch, channels, height, width = latents.shape
    x = latents.view(batch, channels, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, patch * patch * channels)


def _unpatched(tokens: Tensor, side: int, patch: int) -> Tensor:
    """The inverse of `_patches` for square latents of `side`."""
    count = side // patch
    x = tokens.view(len(tokens), count, count, patch, patch, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(len(tokens), -1, side, side)
