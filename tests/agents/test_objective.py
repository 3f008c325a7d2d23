"""GRPO's formulas against slow ones, written out member by member."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from wmgym_agents.objective import (
    ClipConfig,
    group_advantages,
    kl_gate,
    policy_loss,
    rewards_to_go,
)

REWARDS = [[-0.3, -0.1, -0.25, -0.1], [0.0, -1.0, -0.5, -0.2], [-0.4, -0.4, -0.4, -0.4]]


def slow_advantage(kind, group, reward, index):
    others = [r for i, r in enumerate(group) if i != index]
    mean = statistics.mean(group)
    if kind == "mean":
        return reward - mean
    if kind == "rloo":
        return reward - statistics.mean(others)
    if kind == "mean_std":
        return (reward - mean) / (statistics.stdev(group) + 1e-6)
    spread = statistics.mean(statistics.stdev(g) for g in REWARDS)
    return (reward - mean) / (spread + 1e-6)


@pytest.mark.parametrize("kind", ["mean_std", "mean", "batch_std", "rloo"])
def test_advantages(kind):
    rewards = torch.tensor(REWARDS, dtype=torch.float64)
    expected = [[slow_advantage(kind, g, r, i) for i, r in enumerate(g)] for g in REWARDS]
    advantages = group_advantages(rewards, kind)
    torch.testing.assert_close(advantages, torch.tensor(expected, dtype=torch.float64))
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(group_advantages(rewards[:, order], kind), advantages[:, order])
    torch.testing.assert_close(group_advantages(rewards + 5, kind), advantages, atol=1e-8, rtol=0)


def test_advantages_of_what_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match=r"shape \(3, 1\)"):
        group_advantages(torch.zeros(3, 1), "mean")
    with pytest.raises(ValueError, match="advantage='best': allowed are"):
        group_advantages(torch.zeros(3, 2), "best")


def slow_loss(new, old, advantage, clip):
    total, count = 0.0, 0
    for n, o, a in zip(new.flatten(1), old.flatten(1), advantage, strict=True):
        if clip.ratio == "chunk":
            n, o = n.sum()[None], o.sum()[None]
        for x, y in zip(n, o, strict=True):
            ratio = math.exp(x - y)
            value = max(-a * ratio, -a * min(max(ratio, 1 - clip.low), 1 + clip.high))
            if a < 0:
                value = min(value, -a * clip.dual)
            total, count = total + value, count + 1
    return total / count


@pytest.mark.parametrize("ratio", ["dimension", "chunk"])
def test_policy_loss(ratio):
    generator = torch.Generator().manual_seed(0)
    new, old = torch.randn(2, 24, 8, 7, generator=generator, dtype=torch.float64)
    if ratio == "chunk":
        new, old = new / 10, old / 10
    advantage = torch.tensor([1.0, -1.0, 0.5, -2.0, 0.0, 3.0] * 4, dtype=torch.float64)
    clip = ClipConfig(ratio=ratio, low=0.2, high=0.3)
    loss, figures = policy_loss(new, old, advantage, clip)
    assert loss.item() == pytest.approx(slow_loss(new, old, advantage, clip).item())
    assert figures["approx_kl"].item() == pytest.approx((old - new).mean().item())
    assert 0 < figures["clip_fraction"] < 1


def test_on_policy_the_ratio_is_one_and_the_gradient_that_of_reinforce():
    new = torch.randn(4, 8, 7, requires_grad=True)
    advantage = torch.tensor([1.0, -1.0, 2.0, -2.0])
    loss, figures = policy_loss(new, new.detach(), advantage, ClipConfig())
    assert figures["ratio"] == 1
    assert figures["ratio_error"] == 0
    assert figures["clip_fraction"] == 0
    loss.backward()
    expected = -advantage[:, None, None].expand_as(new) / new.numel()
    torch.testing.assert_close(new.grad, expected)


def test_bounds_are_checked():
    with pytest.raises(ValueError, match=r"low=1\.5"):
        ClipConfig(low=1.5)
    with pytest.raises(ValueError, match=r"dual=0\.5"):
        ClipConfig(dual=0.5)
    with pytest.raises(ValueError, match=r"high=inf.* all finite"):
        ClipConfig(high=math.inf)
    with pytest.raises(ValueError, match="ratio='number': allowed are"):
        ClipConfig(ratio="number")


def test_a_chunk_is_judged_by_what_comes_after_it():
    rewards = torch.randn(3, 2, 4)
    for number in range(3):
        expected = sum(rewards[later] for later in range(number, 3)) / 3
        torch.testing.assert_close(rewards_to_go(rewards)[number], expected)
    torch.testing.assert_close(rewards_to_go(rewards)[0], rewards.mean(dim=0))


def test_the_gate_opens_between_its_bounds():
    gates = kl_gate(torch.tensor([-0.1, 0.0, 0.1, 0.2, 1.0]))
    torch.testing.assert_close(gates, torch.tensor([0, 0, 0.5, 1, 1]))
