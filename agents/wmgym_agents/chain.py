"""The denoising chain as a stochastic policy: how actions are drawn, and how likely they were.

A flow policy is a deterministic map from noise to an action chunk and has no likelihood to speak
of. RL needs one, so noise is added while denoising, and the chain `x_0 ... x_K` becomes a Markov
chain with Gaussian steps whose log-density is exact. Two ways:

* `sigma_net` (VLA-RFT, arXiv 2510.00406, section 3.3; ReinFlow, arXiv 2505.22094): every step is
  noisy, `x_{k+1} ~ N(x_k - u dt, sigma(x_k, t_k)^2)`, with a learned and bounded sigma, of a
  network of its own; or, `noise_head`, of a linear layer on the flow head;
* `flow_sde` (Flow-GRPO, arXiv 2505.05470): one step, drawn anew for every start, is a step of the
  stochastic differential equation that has the marginals of the flow, the others are deterministic:
  `dx = (-u + g^2/2 score) dt + g dw`, `score = -(x + t u) / (1 - t)`, `g^2 = a^2 (1 - t) / t`.

With `modes=m` the noise of a step is smooth over the chunk: only the first `m` cosines of its `T`
steps (DCT-II) are disturbed, and a chain's density is that of these `m x 7` coefficients. White
noise mostly jitters, which the world hardly shows; two modes push a chunk aside and bend it. A step
of `flow_sde` then no longer has the marginals of the flow: its drift makes up for white noise.

`_distribution` is the one place that says what a step does; `sample` and `log_prob` both call it,
in float32. The density of the first noise does not depend on the policy and is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.distributions import Normal

from wmgym.settings import check_numbers
from wmgym.spaces import ACTION_DIM
from wmgym_agents.flow_head import FlowHead
from wmgym_agents.randomness import Source, rows

StochasticNoise = Literal["sigma_net", "noise_head", "flow_sde"]
"""Where a chain can be random, so that it has a likelihood."""
Noise = Literal["none", StochasticNoise]
NOISES: tuple[StochasticNoise, ...] = get_args(StochasticNoise)


@dataclass(frozen=True)
class ChainConfig:
    """How actions are denoised.

    Attributes:
        steps: Denoising steps `K`.
        noise: Where the chain is random; `"none"` integrates the flow from the first noise.
        sde_level: `a` of `flow_sde`, the size of its noise.
        modes: Temporal modes of a chunk that are disturbed; None means white noise.
    """

    steps: int = 10
    noise: Noise = "sigma_net"
    sde_level: float = 0.7
    modes: int | None = None

    def __post_init__(self) -> None:
        if self.noise not in ("none", *NOISES):
            raise ValueError(f"noise={self.noise!r}: allowed are 'none' and {NOISES}")
        check_numbers(self, ">= 1", "steps")
        check_numbers(self, "> 0", "sde_level")
        if self.noise == "flow_sde" and self.steps < 2:
            raise ValueError(f"steps={self.steps}: flow_sde needs 2 or more")
        if self.modes is not None and self.modes < 1:
            raise ValueError(f"modes={self.modes}: allowed are 1 to the steps of a chunk, or None")


@dataclass(frozen=True)
class Chain:
    """Denoised chunks with all that their likelihood depends on.

    Attributes:
        states: `(B, K + 1, T, 7)` from noise to normalised actions.
        noisy_steps: `(B, S)` int64, numbers of the steps that were random.
        log_prob: `(B, M, 7)` their log-densities when they were drawn, summed over the steps; `M`
            is the number of modes, `T` for white noise.
    """

    states: Tensor
    noisy_steps: Tensor
    log_prob: Tensor

    @property
    def actions(self) -> Tensor:
        """Chunks `(B, T, 7)` in the policy's normalised space."""
        return self.states[:, -1]

    def rows(self, index: Tensor) -> Chain:
        """Some of the chains."""
        return Chain(self.states[index], self.noisy_steps[index], self.log_prob[index])


def _distribution(
    head: FlowHead, config: ChainConfig, x: Tensor, k: Tensor, context: Tensor, proprio: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and log standard deviation `(B, T, 7)` of step `k` `(B,)` at `x` `(B, T, 7)`."""
    dt = 1.0 / config.steps
    t = k.to(x.dtype) * dt
    if config.noise == "noise_head":
        u, log_sigma = head.velocity_and_log_sigma(x, t, context, proprio)
        return x - u.float() * dt, log_sigma
    u = head.velocity(x, t, context, proprio).float()
    if config.noise == "sigma_net":
        return x - u * dt, head.log_sigma(x, t, context, proprio).float()
    if config.noise == "flow_sde":
        at = t[:, None, None]
        noise = x + at * u
        drift = -u - config.sde_level**2 / (2 * at) * noise
        log_sigma = 0.5 * torch.log((1 - at) / at * dt) + math.log(config.sde_level)
        return x + drift * dt, log_sigma.expand_as(x)
    raise ValueError(f"noise={config.noise!r} has no distribution; allowed: {NOISES}")


def _basis(config: ChainConfig, like: Tensor) -> Tensor:
    """Orthonormal columns `(T, M)` in which a chunk `like` `(..., T, 7)` is disturbed."""
    steps = like.shape[-2]
    if config.modes is None:
        return torch.eye(steps, dtype=like.dtype, device=like.device)
    if config.modes > steps:
        raise ValueError(f"modes={config.modes}: a chunk of {steps} steps has no more than those")
    place = torch.arange(steps, dtype=like.dtype, device=like.device) + 0.5
    number = torch.arange(config.modes, dtype=like.dtype, device=like.device)
    waves = torch.cos(math.pi / steps * place[:, None] * number)
    return waves / waves.norm(dim=0)


def _coefficients(config: ChainConfig, basis: Tensor, log_sigma: Tensor) -> Normal:
    """Distribution of the coefficients `(B, M, 7)` of a step's noise."""
    if config.modes is not None:
        log_sigma = log_sigma.mean(dim=-2, keepdim=True).expand(-1, config.modes, -1)
    return Normal(torch.zeros_like(log_sigma), log_sigma.exp(), validate_args=False)


@torch.no_grad()
def sample(
    head: FlowHead,
    config: ChainConfig,
    context: Tensor,
    proprio: Tensor,
    *,
    group_size: int,
    generator: Source,
    first: Tensor | None = None,
) -> Chain:
    """Draws `group_size` chains for every observation.

    Args:
        head: The flow head.
        config: How to denoise.
        context: `(B, N, D)` tokens of the observations.
        proprio: `(B, 8)` normalised proprioception.
        group_size: Chains per observation, `G`.
        generator: Source of the noise of every observation.
        first: `(B, T, 7)` the noise that the members of an observation all start from; None draws
            one for each.

    Returns:
        `B * G` chains, those of an observation in a row.

    Raises:
        ValueError: A group of none.
    """
    if group_size < 1:
        raise ValueError(f"group_size={group_size}: must be >= 1")
    shape = (group_size, config.steps + 1, head.config.chunk, ACTION_DIM)
    noise = rows(torch.randn, len(context), shape, generator).flatten(0, 1).to(context.device)
    count = len(noise)
    if config.noise == "flow_sde":
        which = rows(torch.rand, len(context), (1,), generator)
        noisy_steps = 1 + (which * (config.steps - 1)).long().clamp(max=config.steps - 2)
        noisy_steps = noisy_steps.repeat_interleave(group_size, 0)
    else:
        every = 0 if config.noise == "none" else config.steps
        noisy_steps = torch.arange(every).expand(count, -1)
    noisy_steps = noisy_steps.to(context.device)

    x = noise[:, 0] if first is None else first.to(noise).repeat_interleave(group_size, 0)
    basis = _basis(config, x)
    states, total = [x], x.new_zeros(count, basis.shape[1], ACTION_DIM)
    for number in range(config.steps):
        k = torch.full((count,), number, device=x.device)
        t = k.to(x.dtype) / config.steps
        noisy = (noisy_steps == number).any(dim=1)
        if noisy.any():
            mean, log_sigma = _distribution(head, config, x, k, context, proprio)
            spread = _coefficients(config, basis, log_sigma)
            push = spread.scale * noise[:, number + 1, : basis.shape[1]]
            drawn = mean + basis @ push
            total += torch.where(noisy[:, None, None], spread.log_prob(push), 0.0)
        if noisy.all():
            x = drawn
        else:
            still = x - head.velocity(x, t, context, proprio).float() / config.steps
            x = torch.where(noisy[:, None, None], drawn, still) if noisy.any() else still
        states.append(x)
    return Chain(torch.stack(states, dim=1), noisy_steps, total)


def log_prob(
    head: FlowHead, config: ChainConfig, chain: Chain, context: Tensor, proprio: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-density of chains, and the entropy of their steps, by number of the chunk.

    All random steps of all chains are evaluated in one pass.

    Args:
        head: The flow head.
        config: How the chains were denoised.
        chain: `B` chains.
        context: `(b, N, D)` tokens of the observations, `B` a multiple of `b`.
        proprio: `(b, 8)` normalised proprioception.

    Returns:
        `(B, M, 7)` log-densities, summed over the random steps, and `(B, M, 7)` entropies, averaged
        over them.

    Raises:
        ValueError: The chains have no random step.
    """
    count, steps = chain.noisy_steps.shape
    if not steps:
        raise ValueError(
            f'chains drawn with noise="none" have no likelihood: draw with one of {NOISES}'
        )
    each = torch.arange(count, device=chain.noisy_steps.device)[:, None]
    x = chain.states[each, chain.noisy_steps].flatten(0, 1)
    after = chain.states[each, chain.noisy_steps + 1].flatten(0, 1)
    mean, log_sigma = _distribution(head, config, x, chain.noisy_steps.flatten(), context, proprio)
    basis = _basis(config, mean)
    spread = _coefficients(config, basis, log_sigma)
    likely = spread.log_prob(basis.T @ (after - mean))
    total = likely.unflatten(0, (count, steps)).sum(dim=1)
    entropy = spread.entropy().unflatten(0, (count, steps)).mean(dim=1)
    return total, entropy
