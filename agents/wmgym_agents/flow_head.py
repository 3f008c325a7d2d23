"""The action head: a small diffusion transformer that turns noise into a chunk of actions.

`FlowTransformer` maps a noisy chunk `x` `(B, 8, 7)`, a flow time `t` and the context of an
observation to seven numbers per control step. It is used twice with weights of its own: as the flow
head, whose output is the velocity `u = noise - action`, and as the sigma-net, whose output becomes
the standard deviation of each denoising step. Both read the noisy chunk and the proprioception
through the same two projectors. Shapes, key names and quirks are those of the released VLA-RFT, so
that its files load (arXiv 2510.00406, sections 3.1 and 3.3):

* a noisy chunk is embedded number by number, and the seven vectors of a step are concatenated;
* the time embedding has cosines first and takes `t` in [0, 1] as it is;
* every block owns a cross-attention, but only even blocks and the last one use theirs.

Conventions: `t = 0` is noise and `t = 1` is data, `x_t = (1 - t) noise + t action`. Contexts and
proprioception may have fewer rows than the chunks: each then serves as many chunks in a row, and
what depends on the observation alone is computed once for a group of samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wmgym.settings import check_numbers
from wmgym.spaces import ACTION_DIM, PROPRIO_DIM

_TIME_FREQUENCIES = 128
_MAX_PERIOD = 10_000.0


@dataclass(frozen=True)
class HeadConfig:
    """Shape of a flow head; the defaults are the published one.

    Attributes:
        chunk: Control steps of a chunk.
        context: Width of the context tokens.
        embed: Width of the projected proprioception and of every projected number of a chunk.
        width: Width of the transformer.
        depth: Its blocks.
        heads: Attention heads.
        dropout: Of attention weights, in training.
        sigma: Smallest and largest standard deviation of sigma-net and noise head.
    """

    chunk: int = 8
    context: int = 896
    embed: int = 896
    width: int = 512
    depth: int = 8
    heads: int = 8
    dropout: float = 0.1
    sigma: tuple[float, float] = (0.08, 0.20)

    def __post_init__(self) -> None:
        check_numbers(self, ">= 1", "chunk", "context", "embed", "width", "depth", "heads")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: must be >= 0 and < 1")
        if not 0 < self.sigma[0] < self.sigma[1] < math.inf:
            raise ValueError(f"sigma={self.sigma}: must be finite and 0 < smallest < largest")


def _serve(rows: Tensor, count: int) -> Tensor:
    """Every row as many times in a row as makes `count` rows."""
    if count % len(rows):
        raise ValueError(f"{count} chunks cannot share {len(rows)} observations evenly")
    return rows.repeat_interleave(count // len(rows), dim=0)


class Projector(nn.Module):
    """Two linear layers."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Projects `(..., inputs)` to `(..., width)`."""
        return self.fc2(F.gelu(self.fc1(x)))


class _Attention(nn.Module):
    """Self-attention over the steps of a chunk."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(
            q, k, v, dropout_p=self.dropout if self.training else 0.0
        )
        return self.proj(mixed.transpose(1, 2).flatten(2))


class _CrossProjections(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.v_proj = nn.Linear(width, width)
        self.l_proj = nn.Linear(width, width)
        self.values_l_proj = nn.Linear(width, width)
        self.out_v_proj = nn.Linear(width, width)


class _CrossAttention(nn.Module):
    """From the steps of a chunk ("v") to the context tokens ("l")."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.layer_norm_v = nn.LayerNorm(width)
        self.layer_norm_l = nn.LayerNorm(width)
        self.attn = _CrossProjections(width)
        self.gamma_v = nn.Parameter(torch.full((width,), 1e-4))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        context = self.layer_norm_l(context)
        asked = self.attn.v_proj(self.layer_norm_v(x)).view(len(context), -1, x.shape[-1])
        q, k, v = (
            tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for tokens in (asked, self.attn.l_proj(context), self.attn.values_l_proj(context))
        )
        mixed = F.scaled_dot_product_attention(
            q, k, v, dropout_p=self.dropout if self.training else 0.0
        )
        found = mixed.transpose(1, 2).reshape(x.shape)
        return x + self.gamma_v * self.attn.out_v_proj(found)


class _MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def _modulation(width: int, parts: int) -> nn.Sequential:
    layer = nn.Linear(width, parts * width)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return nn.Sequential(nn.SiLU(), layer)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


class _Block(nn.Module):
    def __init__(self, config: HeadConfig, *, looks: bool) -> None:
        super().__init__()
        width, heads, dropout = config.width, config.heads, config.dropout
        self.looks = looks
        self.attn_temporal = _Attention(width, heads, dropout)
        self.cross_attn = _CrossAttention(width, heads, dropout).requires_grad_(looks)
        self.mlp = _MLP(width)
        self.adaLN_modulation = _modulation(width, 6)

    def forward(self, x: Tensor, condition: Tensor, context: Tensor) -> Tensor:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.adaLN_modulation(condition).chunk(
            6, dim=-1
        )
        x = x + gate[:, None] * self.attn_temporal(_modulate(x, shift, scale))
        if self.looks:
            x = self.cross_attn(x, context)
        return x + mlp_gate[:, None] * self.mlp(_modulate(x, mlp_shift, mlp_scale))


class _TimeEmbedding(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(2 * _TIME_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width)
        )

    def forward(self, t: Tensor) -> Tensor:
        order = torch.arange(_TIME_FREQUENCIES, device=t.device) / _TIME_FREQUENCIES
        angles = t[:, None] * torch.exp(-math.log(_MAX_PERIOD) * order)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class _FinalLayer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, ACTION_DIM)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.adaLN_modulation = _modulation(width, 2)

    def features(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)
        return _modulate(x, shift, scale)


def _step_embedding(steps: int, width: int) -> Tensor:
    """Sines and cosines `(1, steps, width)` of the step number."""
    order = torch.arange(width // 2, dtype=torch.float64) / (width / 2)
    angles = torch.arange(steps, dtype=torch.float64)[:, None] / _MAX_PERIOD**order
    return torch.cat([angles.sin(), angles.cos()], dim=-1)[None].float()


class FlowTransformer(nn.Module):
    """Seven numbers per control step; see the module docstring."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        width = config.width
        self.temp_embed = nn.Parameter(_step_embedding(config.chunk, width), requires_grad=False)
        self.x_embedder = nn.Linear(ACTION_DIM * config.embed, width)
        self.t_embedder = _TimeEmbedding(width)
        self.proprio_embedder = nn.Linear(config.embed, width)
        self.context_adapter = nn.Linear(config.context, width)
        last = config.depth - 1
        self.blocks = nn.ModuleList(
            _Block(config, looks=number % 2 == 0 or number == last)
            for number in range(config.depth)
        )
        self.final_layer = _FinalLayer(width)

    def forward(self, noisy: Tensor, t: Tensor, context: Tensor, proprio: Tensor) -> Tensor:
        """One evaluation.

        Args:
            noisy: `(B, T, 7 * embed)` projected noisy chunks.
            t: `(B,)` flow times in [0, 1].
            context: `(b, N, context)` tokens of the observations, `B` a multiple of `b`.
            proprio: `(b, embed)` projected proprioception.

        Returns:
            `(B, T, 7)`.
        """
        return self.final_layer.linear(self.features(noisy, t, context, proprio))

    def features(self, noisy: Tensor, t: Tensor, context: Tensor, proprio: Tensor) -> Tensor:
        """What the last linear layer reads, `(B, T, width)`; arguments as in `forward`."""
        context = self.context_adapter(context)
        observed = self.proprio_embedder(proprio) + context.mean(dim=1)
        condition = _serve(observed, len(noisy)) + self.t_embedder(t)
        x = self.x_embedder(noisy) + self.temp_embed
        for block in self.blocks:
            x = block(x, condition, context)
        return self.final_layer.features(x, condition)


class FlowHead(nn.Module):
    """Flow head and what can make it random, with the projectors they share.

    `sigma_net` is the published one; `noise_head` is a linear layer beside the flow head's last
    one, which needs no second network.
    """

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        self.action_head = FlowTransformer(config)
        self.sigma_net = FlowTransformer(config)
        self.noise_head = nn.Linear(config.width, ACTION_DIM)
        nn.init.zeros_(self.noise_head.weight)
        nn.init.zeros_(self.noise_head.bias)
        self.noisy_action_projector = Projector(1, config.embed)
        self.proprio_projector = Projector(PROPRIO_DIM, config.embed)

    def velocity(self, x: Tensor, t: Tensor, context: Tensor, proprio: Tensor) -> Tensor:
        """Velocity `u = noise - action` `(B, T, 7)` at noisy chunks `x` `(B, T, 7)`.

        Args:
            x: `(B, T, 7)` noisy chunks.
            t: `(B,)` flow times, 0 for noise and 1 for data.
            context: `(b, N, context)` tokens of the observations, `B` a multiple of `b`.
            proprio: `(b, 8)` normalised proprioception.
        """
        return self.action_head(self._noisy(x), t, context, self.proprio_projector(proprio))

    def log_sigma(self, x: Tensor, t: Tensor, context: Tensor, proprio: Tensor) -> Tensor:
        """Log standard deviation `(B, T, 7)` of a denoising step at `x`, within `config.sigma`."""
        raw = self.sigma_net(self._noisy(x), t, context, self.proprio_projector(proprio))
        return self._bounded(raw)

    def velocity_and_log_sigma(
        self, x: Tensor, t: Tensor, context: Tensor, proprio: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`velocity`, and the log standard deviation that `noise_head` reads beside it."""
        features = self.action_head.features(
            self._noisy(x), t, context, self.proprio_projector(proprio)
        )
        u = self.action_head.final_layer.linear(features)
        return u, self._bounded(self.noise_head(features))

    def _bounded(self, raw: Tensor) -> Tensor:
        low, high = (math.log(bound) for bound in self.config.sigma)
        return low + (high - low) * (torch.tanh(raw.float()) + 1) / 2

    def _noisy(self, x: Tensor) -> Tensor:
        return self.noisy_action_projector(x[..., None]).flatten(-2)
