"""`FlowVLA`: a vision-language-action policy with a flow-matching head.

An observation is encoded once into tokens; the flow head turns noise into a chunk of normalised
actions under them; the statistics of the demonstrations turn these into the environment's. One
folder holds all of it, `config.json`, `model.safetensors` and `dataset_statistics.json`, whether it
was written by supervised fine-tuning or by RL.

Two presets share everything but the encoder: `small` is trained from nothing on a laptop,
`vla-adapter` has the shape of the released VLA-RFT, whose files `wmgym_agents.published` loads. It
resizes pictures of any size to its own, bicubic with antialiasing, before they are cropped: the
released evaluation resizes with Lanczos's filter, which PyTorch lacks.

An observation is a dict with `image` uint8 `(B, H, W, 3)`, `proprio` float `(B, 8)` and
`instruction`, `B` sentences. The environments give the first two and `info["instruction"]`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from wmgym.checkpoints import (
    CONFIG,
    WEIGHTS,
    CheckpointError,
    load_weights,
    model_folder,
    read_config,
    save_model,
)
from wmgym.data.statistics import Statistics, VectorStatistics
from wmgym.spaces import ACTION_DIM, PROPRIO_DIM
from wmgym_agents.augment import center_crop
from wmgym_agents.chain import Chain, ChainConfig, log_prob, sample
from wmgym_agents.encoder import EncoderConfig, SmallEncoder
from wmgym_agents.flow_head import FlowHead, HeadConfig
from wmgym_agents.randomness import Source, rows
from wmgym_agents.vla_adapter import VLAAdapterConfig, VLAAdapterEncoder

FAMILY = "wmgym-flow-vla"
STATISTICS = "dataset_statistics.json"
STATISTICS_KEY = "wmgym"
TOKENIZER = "tokenizer"

SMALL_HEAD = HeadConfig(context=256, embed=32, width=192, depth=3, heads=6, dropout=0.0)
SMALL_CHAIN = ChainConfig(steps=5)


class Observation(TypedDict):
    """What a policy sees; see the module docstring."""

    image: NDArray[np.uint8] | Tensor
    proprio: NDArray[np.float32] | Tensor
    instruction: Sequence[str]


@dataclass(frozen=True)
class PolicyConfig:
    """Shape of a `FlowVLA`.

    Attributes:
        encoder: Shape of the encoder.
        head: Shape of the flow head; `context` is the encoder's width.
        chain: How actions are denoised.
        gripper: What the head calls the gripper: "libero" is -1 open and 1 closed as in the
            environment, "published" is 1 open and 0 closed as in the released VLA-RFT.
    """

    encoder: EncoderConfig | VLAAdapterConfig = field(default_factory=EncoderConfig)
    head: HeadConfig = SMALL_HEAD
    chain: ChainConfig = SMALL_CHAIN
    gripper: Literal["libero", "published"] = "libero"

    def __post_init__(self) -> None:
        if self.head.context != self.encoder.width:
            raise ValueError(
                f"head.context={self.head.context}: must be encoder.width={self.encoder.width}"
            )
        if self.gripper not in ("libero", "published"):
            raise ValueError(f"gripper={self.gripper!r}: allowed are 'libero' and 'published'")


PRESETS = {
    "small": PolicyConfig(),
    "vla-adapter": PolicyConfig(
        VLAAdapterConfig(), HeadConfig(), ChainConfig(), gripper="published"
    ),
}
"""Shapes by name."""


@dataclass(frozen=True)
class Encoded:
    """An encoded observation.

    Attributes:
        tokens: `(B, N, D)`.
        proprio: `(B, 8)`, normalised.
    """

    tokens: Tensor
    proprio: Tensor


class _Scale(nn.Module):
    """Maps the 1st and 99th percentile to -1 and 1 (BOUNDS_Q99), on tensors.

    With `open_is_one`, the last entry is a gripper: -1 and 1 become 1 and 0.
    """

    def __init__(self, statistics: VectorStatistics, *, open_is_one: bool = False) -> None:
        super().__init__()
        s = statistics
        constant = s.min == s.max
        low = np.where(s.mask, s.q01, -1.0)
        high = np.where(s.mask, s.q99, 1.0)
        low, high = np.where(constant, s.min - 1, low), np.where(constant, s.min + 1, high)
        if open_is_one:
            low[-1], high[-1] = 3.0, -1.0
        self.register_buffer("low", torch.tensor(low, dtype=torch.float32), persistent=False)
        self.register_buffer("high", torch.tensor(high, dtype=torch.float32), persistent=False)

    def to_unit(self, x: Tensor) -> Tensor:
        low, high = self.get_buffer("low"), self.get_buffer("high")
        return (2 * (x - low) / (high - low + 1e-8) - 1).clamp(-1, 1)

    def from_unit(self, x: Tensor) -> Tensor:
        low, high = self.get_buffer("low"), self.get_buffer("high")
        return 0.5 * (x + 1) * (high - low + 1e-8) + low


class FlowVLA(nn.Module):
    """The policy.

    It can be evaluated as it is: `reset` begins an episode, `act` answers an observation. What is
    random comes from a generator that is given, or else from the one that `reset` made, and is as
    large as the temperature that is given, or else as `temperature`.

    Args:
        config: Its shape.
        statistics: Of the demonstrations it learns from.

    Attributes:
        generator: Made by `reset`, None before; the only state that acting changes.
        temperature: Size of the noise that `act` denoises.
    """

    def __init__(self, config: PolicyConfig, statistics: Statistics) -> None:
        super().__init__()
        self.generator: torch.Generator | None = None
        self.temperature = 1.0
        self.config, self.statistics = config, statistics
        self.encoder = _encoder(config.encoder)
        self.head = FlowHead(config.head)
        published = config.gripper == "published"
        self.action_scale = _Scale(statistics.action, open_is_one=published)
        self.proprio_scale = _Scale(statistics.proprio)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head.action_head.temp_embed.device

    @property
    def image_size(self) -> int:
        """Height and width of the pictures that its encoder sees."""
        return self.config.encoder.image_size

    def reset(self, seed: int) -> None:
        """Begins an episode: `act` without a generator draws from this seed on."""
        self.generator = torch.Generator().manual_seed(seed)

    def encode(self, observation: Observation) -> Encoded:
        """Tokens and normalised proprioception of `B` observations.

        Raises:
            ValueError: A shape or the number of instructions is wrong, or proprioception is NaN or
                infinite.
        """
        image = torch.as_tensor(observation["image"], device=self.device)
        proprio = torch.as_tensor(observation["proprio"], device=self.device).float()
        instruction = observation["instruction"]
        size = self.image_size
        sizes = image.shape[1:3] if self.config.encoder.resizes else (size, size)
        if image.dtype != torch.uint8 or image.ndim != 4 or image.shape[1:] != (*sizes, 3):
            expected = "H, W" if self.config.encoder.resizes else f"{size}, {size}"
            raise ValueError(
                f"image is {image.dtype} {tuple(image.shape)}, expected uint8 (B, {expected}, 3)"
            )
        if proprio.shape != (len(image), PROPRIO_DIM):
            raise ValueError(
                f"proprio has shape {tuple(proprio.shape)}, expected ({len(image)}, {PROPRIO_DIM})"
            )
        if not torch.isfinite(proprio).all():
            raise ValueError("proprio has NaN or infinity: all of it must be finite")
        if isinstance(instruction, str) or len(instruction) != len(image):
            raise ValueError(f"instruction must be a sequence of {len(image)} sentences")
        pixels = self.resized(image.movedim(-1, 1).float() / 255)
        return self.encode_pixels(center_crop(pixels), proprio, instruction)

    def resized(self, pixels: Tensor) -> Tensor:
        """Pictures `(B, 3, H, W)` in [0, 1] at the size of an encoder that has pictures resized."""
        size = (self.image_size,) * 2
        if not self.config.encoder.resizes or pixels.shape[2:] == size:
            return pixels
        return F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 1)

    def encode_pixels(self, pixels: Tensor, proprio: Tensor, instruction: Sequence[str]) -> Encoded:
        """As `encode`, of pictures `(B, 3, H, W)` in [0, 1] that are cropped already."""
        return Encoded(self.encoder(pixels, instruction), self.proprio_scale.to_unit(proprio))

    def sample(
        self,
        observation: Observation | Encoded,
        group_size: int,
        generator: Source,
        first: Tensor | None = None,
    ) -> tuple[Tensor, Chain]:
        """Draws chunks.

        Args:
            observation: `B` observations, or what `encode` made of them.
            group_size: Chunks per observation, `G`.
            generator: Source of the noise of every observation.
            first: `(B, T, 7)` first noise of all members of an observation, or None.

        Returns:
            Actions `(B, G, T, 7)` for the environment, and the `B * G` chains they came from.
        """
        seen = self._encoded(observation)
        chain = sample(
            self.head,
            self.config.chain,
            seen.tokens,
            seen.proprio,
            group_size=group_size,
            generator=generator,
            first=first,
        )
        return self.executed(chain.actions).unflatten(0, (-1, group_size)), chain

    def log_prob(self, observation: Observation | Encoded, chain: Chain) -> tuple[Tensor, Tensor]:
        """Log-densities and entropies of chains, `(B * G, M, 7)` each."""
        seen = self._encoded(observation)
        return log_prob(self.head, self.config.chain, chain, seen.tokens, seen.proprio)

    @torch.no_grad()
    def act(
        self,
        observation: Observation | Encoded,
        generator: Source | None = None,
        temperature: float | None = None,
    ) -> NDArray[np.float32]:
        """One chunk `(B, T, 7)` per observation, denoised without noise, for the environment.

        Args:
            observation: `B` observations, or what `encode` made of them.
            generator: Source of the first noise of every observation; None goes on with the
                policy's own, which `reset` made.
            temperature: Size of the first noise: 1 draws from the flow as it was trained, 0 always
                returns the chunk at its centre; None is the policy's own.

        Raises:
            ValueError: No generator and no `reset` before, a temperature that is negative or not
                finite, or an observation that `encode` refuses.
        """
        generator = self.generator if generator is None else generator
        if generator is None:
            raise ValueError("nothing to draw from: call reset(seed) first, or give a generator")
        temperature = self.temperature if temperature is None else temperature
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature={temperature}: must be finite and >= 0")
        seen = self._encoded(observation)
        shape = (self.config.head.chunk, ACTION_DIM)
        first = temperature * rows(torch.randn, len(seen.tokens), shape, generator)
        chain = sample(
            self.head,
            dataclasses.replace(self.config.chain, noise="none"),
            seen.tokens,
            seen.proprio,
            group_size=1,
            generator=generator,
            first=first,
        )
        return self.executed(chain.actions).cpu().numpy()

    def flow_loss(
        self,
        observation: Observation | Encoded,
        actions: Tensor,
        generator: Source,
        draws: int = 1,
    ) -> Tensor:
        """Squared error `(B * draws, T, 7)` of the flow at random times of recorded chunks.

        Times are drawn as in the released VLA-RFT, `0.999 g / (g + h) + 0.001` with
        `g = U^(1/1.5)` and `h` uniform: a little more of them near the data.

        Args:
            observation: `B` observations, or what `encode` made of them.
            actions: `(B, T, 7)` recorded chunks, in the environment's units.
            generator: Source of noise and times of every chunk.
            draws: Times and noises per chunk.
        """
        seen = self._encoded(observation)
        target = self.action_scale.to_unit(actions).repeat_interleave(draws, 0)
        each = (draws, *target.shape[1:])
        noise = rows(torch.randn, len(actions), each, generator).flatten(0, 1).to(target)
        g, h = rows(torch.rand, len(actions), (draws, 2), generator).flatten(0, 1).to(target).T
        g = g ** (1 / 1.5)
        t = 0.999 * g / (g + h) + 0.001
        at = t[:, None, None]
        u = self.head.velocity((1 - at) * noise + at * target, t, seen.tokens, seen.proprio)
        return (u.float() - (noise - target)) ** 2

    def executed(self, actions: Tensor) -> Tensor:
        """Normalised chunks `(..., 7)` for the environment, the gripper open or closed."""
        raw = self.action_scale.from_unit(actions)
        gripper = torch.where(raw[..., ACTION_DIM - 1 :] > 0, 1.0, -1.0)
        return torch.cat([raw[..., : ACTION_DIM - 1].clamp(-1, 1), gripper], dim=-1)

    def clipped(self, actions: Tensor) -> Tensor:
        """Share of the numbers of normalised chunks that `executed` clips, gripper left out."""
        raw = self.action_scale.from_unit(actions)[..., : ACTION_DIM - 1]
        return (raw.abs() > 1).float().mean()

    def _encoded(self, observation: Observation | Encoded) -> Encoded:
        return observation if isinstance(observation, Encoded) else self.encode(observation)

    def save_pretrained(self, folder: str | Path, *, half: bool = False, **described: Any) -> None:
        """Writes the policy's folder; each file appears complete or not at all.

        Args:
            folder: Made if missing.
            half: Store matrices in bfloat16, half the size.
            **described: Further entries of `config.json`, such as how it was trained.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        shape = dataclasses.asdict(self.config)
        if isinstance(self.encoder, VLAAdapterEncoder):
            self.encoder.save_tokenizer(folder / TOKENIZER)
            shape["encoder"]["tokenizer"] = TOKENIZER
        self.statistics.save(folder / STATISTICS, STATISTICS_KEY)
        kind = next(kind for kind, of in _KINDS.items() if isinstance(self.config.encoder, of))
        config = {"family": FAMILY, "encoder": kind, "policy": shape, **described}
        save_model(folder, self, config, half=half)

    @classmethod
    def from_pretrained(cls, policy: str | Path) -> FlowVLA:
        """Loads a policy onto the CPU, in evaluation mode.

        Args:
            policy: A folder, or the name of a policy that ships with wmgym.

        Raises:
            CheckpointError: There is no such policy, or its files are damaged or foreign.
        """
        folder = model_folder("policy", policy)
        if any(folder.glob("action_head*checkpoint*")):
            raise CheckpointError(
                f"{folder} has files of the released VLA-RFT: `wmgym import-policy {folder} OUT` "
                "makes a policy of them"
            )
        document = read_config(folder, "policy", FAMILY)
        kind = document.get("encoder", "small")
        if kind not in _KINDS:
            raise CheckpointError(
                f"{folder / CONFIG} says encoder={kind!r}; allowed are {list(_KINDS)}"
            )
        try:
            statistics = Statistics.load(folder / STATISTICS, STATISTICS_KEY)
            with torch.random.fork_rng(devices=[]):
                model = cls(_read_shape(document["policy"], kind, folder), statistics)
        except CheckpointError:
            raise
        except OSError as error:
            raise CheckpointError(f"{folder} does not describe a policy: {error}") from None
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{folder} does not describe a policy: {error!r}") from None
        if isinstance(model.encoder, VLAAdapterEncoder):
            model.encoder.tokenizer()
        load_weights(model, folder / WEIGHTS)
        return model.eval()


_KINDS: dict[str, type[EncoderConfig | VLAAdapterConfig]] = {
    "small": EncoderConfig,
    "vla-adapter": VLAAdapterConfig,
}


def _encoder(config: EncoderConfig | VLAAdapterConfig) -> SmallEncoder | VLAAdapterEncoder:
    if isinstance(config, VLAAdapterConfig):
        return VLAAdapterEncoder(config)
    return SmallEncoder(config)


def _read_shape(shape: dict[str, Any], kind: str, folder: Path) -> PolicyConfig:
    encoder, head = shape["encoder"], shape["head"]
    if kind == "vla-adapter":
        encoder = {**encoder, "tokenizer": str(folder / encoder["tokenizer"])}
    return PolicyConfig(
        encoder=_KINDS[kind].from_dict(encoder),
        head=HeadConfig(**{**head, "sigma": tuple(head["sigma"])}),
        chain=ChainConfig(**shape["chain"]),
        gripper=shape.get("gripper", "libero"),
    )
