"""The published dynamics: a Llama that continues a sequence of tokens.

`TokenDynamics` has the parameters of Hugging Face's `LlamaForCausalLM` under their names, reads and
writes its folders, and computes the same: RMSNorm, rotary positions, causal attention, SwiGLU
(Touvron et al., arXiv 2302.13971). `logits` is the plain pass over whole sequences, without a
cache: what training uses, and what the fast generation in `generate.py` is tested against.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wmgym.checkpoints import save_model
from wmgym.settings import check_numbers
from wmgym.spaces import ACTION_DIM
from wmgym.worlds.tokens.attention import causal_attention
from wmgym.worlds.tokens.folders import Described, read_model
from wmgym.worlds.tokens.noise import keys_of
from wmgym.worlds.tokens.sampling import GREEDY, Decoding
from wmgym.worlds.tokens.vocabulary import PUBLISHED, Vocabulary, as_integers

WEIGHTS = "model.safetensors"
_WRITTEN_AS = {"architectures": ["LlamaForCausalLM"]}
_PLAIN_ROPE = {"rope_type": "default", "partial_rotary_factor": 1.0}
_INIT_STD = 0.02


@dataclass(frozen=True)
class TokenDynamicsConfig(Described):
    """Shape of a `TokenDynamics`; names and defaults are those of the published config.

    Attributes:
        vocab_size: Tokens `V`.
        hidden_size: Width `D`.
        intermediate_size: Width of the MLP.
        num_hidden_layers: Layers.
        num_attention_heads: Heads of the queries.
        num_key_value_heads: Heads of keys and values; None: as many.
        head_dim: Width of a head; None: `D` over the heads.
        max_position_embeddings: Longest sequence.
        rms_norm_eps: Of the norms.
        rope_theta: Base of the rotary positions.
        hidden_act: Activation, "silu".
        attention_bias: Whether attention has biases, False.
        mlp_bias: Whether the MLP has, False.
        tie_word_embeddings: Whether input and output embeddings are one, False.
        rope_scaling: Change of the rotary positions, None.
        bos_token_id: First token, which sequences do not have.
        eos_token_id: Last token, which they do not have either.
    """

    kind = ("model_type", "llama")

    vocab_size: int = 9008
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    rope_scaling: dict[str, Any] | None = None
    bos_token_id: int | None = 9006
    eos_token_id: int | tuple[int, ...] | None = 9007

    def __post_init__(self) -> None:
        check_numbers(self, ">= 1", "vocab_size", "hidden_size", "intermediate_size")
        check_numbers(self, ">= 1", "num_hidden_layers", "num_attention_heads")
        check_numbers(self, ">= 1", "max_position_embeddings", "kv_heads", "head_width")
        check_numbers(self, "> 0", "rms_norm_eps", "rope_theta")
        self.require(hidden_act="silu", attention_bias=False, mlp_bias=False, rope_scaling=None)
        self.require(tie_word_embeddings=False)
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of "
                f"num_attention_heads={self.num_attention_heads}"
            )
        if self.head_width % 2:
            raise ValueError(f"heads of width {self.head_width}: rotary positions need an even one")
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.kv_heads}"
            )

    @classmethod
    def of(cls, described: dict[str, Any]) -> TokenDynamicsConfig:
        """As `Described.of`; newer files keep the rotary positions in an object of their own."""
        rope = {"partial_rotary_factor": described.get("partial_rotary_factor", 1.0)}
        for name in ("rope_scaling", "rope_parameters"):
            given = described.get(name) or {}
            if not isinstance(given, dict):
                raise TypeError(f"{name}={given!r} is {type(given).__name__}, not dict")
            rope |= {"rope_type" if key == "type" else key: v for key, v in given.items()}
        theta = rope.pop("rope_theta", described.get("rope_theta", cls.rope_theta))
        other = {k: v for k, v in rope.items() if k not in _PLAIN_ROPE or v != _PLAIN_ROPE[k]}
        if other:
            raise ValueError(
                f"rope_scaling or rope_parameters={other} are not supported, {_PLAIN_ROPE} are"
            )
        return super().of(described | {"rope_theta": theta, "rope_scaling": None})

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        given = self.num_key_value_heads
        return self.num_attention_heads if given is None else given

    @property
    def head_width(self) -> int:
        """Width of a head."""
        given = self.head_dim
        return self.hidden_size // self.num_attention_heads if given is None else given


def check_sequences(config: TokenDynamicsConfig, vocabulary: Vocabulary, frames: int) -> None:
    """Checks that dynamics can hold sequences of so many frames, the first one included.

    Raises:
        ValueError: They know too few tokens or positions.
    """
    longest = vocabulary.prefix + (frames - 1) * vocabulary.frame
    if config.vocab_size < vocabulary.size or config.max_position_embeddings < longest:
        raise ValueError(
            f"dynamics with vocab_size={config.vocab_size} and max_position_embeddings="
            f"{config.max_position_embeddings}; the tokenizer, the actions and {frames} frames "
            f"need {vocabulary.size} and {longest} positions"
        )


class RMSNorm(nn.Module):
    """Root mean square norm, computed in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Same shape out as in."""
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x` over its root mean square, in float32, times `weight`."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def rotary(positions: Tensor, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines `(..., width)` float32 of positions `(...)`."""
    steps = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32)
    angles = positions[..., None].float() * (1.0 / theta ** (steps / width))
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the halves of `x` `(..., width)` by the angles of its position."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class _Attention(nn.Module):
    def __init__(self, config: TokenDynamicsConfig) -> None:
        super().__init__()
        width, head = config.hidden_size, config.head_width
        self.head, self.causal = head, causal_attention("sdpa")
        self.q_proj = nn.Linear(width, config.num_attention_heads * head, bias=False)
        self.k_proj = nn.Linear(width, config.kv_heads * head, bias=False)
        self.v_proj = nn.Linear(width, config.kv_heads * head, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * head, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        return self.o_proj(self.causal(q, k, v).flatten(2))


class _MLP(nn.Module):
    def __init__(self, config: TokenDynamicsConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class _Layer(nn.Module):
    def __init__(self, config: TokenDynamicsConfig) -> None:
        super().__init__()
        self.self_attn = _Attention(config)
        self.mlp = _MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class _Llama(nn.Module):
    def __init__(self, config: TokenDynamicsConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class TokenDynamics(nn.Module):
    """Next-token logits; see the module docstring.

    Args:
        config: Its shape, or the JSON object of a `config.json` with it.
    """

    def __init__(self, config: TokenDynamicsConfig | Mapping[str, Any]) -> None:
        super().__init__()
        if not isinstance(config, TokenDynamicsConfig):
            config = TokenDynamicsConfig.of(dict(config))
        self.config = config
        self.model = _Llama(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=_INIT_STD)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> TokenDynamics:
        """Reads a folder of `config.json` and `model.safetensors`.

        Args:
            folder: A folder, or the id of a Hugging Face repository.

        Raises:
            CheckpointError: Something is missing, damaged, or does not fit.
        """
        return read_model(cls, TokenDynamicsConfig, folder, WEIGHTS)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes such a folder, which `transformers` loads as well.

        Raises:
            FloatingPointError: A weight is NaN or infinite; nothing is written.
        """
        described = self.config.describe() | _WRITTEN_AS | dict([self.config.kind])
        save_model(Path(folder), self, described, weights=WEIGHTS)

    def logits(self, tokens: Tensor, at: Tensor | None = None) -> Tensor:
        """Logits `(B, L, V)` of the token after each of `tokens` `(B, L)`.

        Args:
            tokens: Sequences.
            at: Places `(P,)` whose logits `(B, P, V)` are wanted; None wants all.

        Raises:
            TypeError: No tensor of integers.
            ValueError: Tokens of another shape, outside the vocabulary, or too many.
        """
        hidden = self.hidden(self.checked(tokens))
        return self.lm_head(hidden if at is None else hidden[:, at])

    def generate(
        self,
        prompt: Tensor,
        actions: Tensor,
        *,
        vocabulary: Vocabulary = PUBLISHED,
        decoding: Decoding = GREEDY,
    ) -> Tensor:
        """Imagines `T` frames after each prompt, 64 tokens and the next action's 7 in turns.

        The world behind the environment goes about it in the same way, and shares what prompts of
        one start have in common (`wmgym.worlds.tokens.generate`).

        Args:
            prompt: `(B, P + 7)` ids: context, first frame, first action; 1,095 as published.
            actions: `(B, T - 1, 7)` ids of the actions after the first.
            vocabulary: What ids mean.
            decoding: How the next token is chosen; noise follows from the start of the prompt.

        Returns:
            `(B, T, n)` ids of the frames.

        Raises:
            ValueError: Shapes do not fit, or ids are outside the vocabulary.
        """
        from wmgym.worlds.tokens.generate import Generator

        length = vocabulary.prefix + ACTION_DIM
        if prompt.ndim != 2 or prompt.shape[1] != length:
            raise ValueError(f"prompt has shape {tuple(prompt.shape)}, expected (B, {length})")
        if actions.ndim != 3 or actions.shape[::2] != (len(prompt), ACTION_DIM):
            raise ValueError(
                f"actions have shape {tuple(actions.shape)}, "
                f"expected ({len(prompt)}, T - 1, {ACTION_DIM})"
            )
        prompt, actions = as_integers("prompt", prompt), as_integers("actions", actions)
        action_tokens = torch.cat([prompt[:, None, -ACTION_DIM:], actions], 1)
        self.checked(torch.cat([prompt, actions.flatten(1)], 1))
        prefix = prompt[:, : vocabulary.prefix]
        generator = Generator(self, vocabulary, decoding, self.lm_head.weight.dtype)
        noise = keys_of(prefix, decoding.seed)
        return generator.generate(generator.prefix(prefix), 1, action_tokens, noise)[0]

    def hidden(self, tokens: Tensor) -> Tensor:
        """What `lm_head` turns into logits: `(B, L, D)` of tokens `(B, L)`."""
        config = self.config
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        cos, sin = (a[:, None] for a in rotary(positions, config.head_width, config.rope_theta))
        x = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            x = layer(x, cos.to(x.dtype), sin.to(x.dtype))
        return self.model.norm(x)

    forward = logits

    def checked(self, tokens: Tensor) -> Tensor:
        """A batch of sequences of the vocabulary as int64; see `logits` for what it raises."""
        tokens = as_integers("tokens", tokens)
        most, vocabulary = self.config.max_position_embeddings, self.config.vocab_size
        if tokens.ndim != 2 or not 1 <= tokens.shape[1] <= most:
            raise ValueError(f"tokens have shape {tuple(tokens.shape)}, expected (B, 1 ... {most})")
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
            raise ValueError(
                f"tokens are {int(tokens.min())} ... {int(tokens.max())}, allowed 0 ... "
                f"{vocabulary - 1}"
            )
        return tokens
