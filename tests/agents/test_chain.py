"""The denoising chain: what is drawn, and how likely it is said to have been."""

from __future__ import annotations

import math

import pytest
import torch
from test_flow_head import SMALL, inputs, random_head
from torch.distributions import Normal
from wmgym_agents.chain import NOISES, Chain, ChainConfig, _distribution, log_prob, sample

NOISY = [ChainConfig(steps=5, noise=noise) for noise in NOISES]


def ids(config):
    return config.noise


def draw(config, rows=3, group_size=4, seed=0, head=None):
    head = random_head() if head is None else head
    _, _, context, proprio = inputs(rows, rows)
    generator = torch.Generator().manual_seed(seed)
    chain = sample(head, config, context, proprio, group_size=group_size, generator=generator)
    return head, chain, context, proprio


class GaussianToy:
    """The exact flow of data `N(mean, std^2)`: one number, whatever the observation."""

    config = SMALL
    mean, std = 0.7, 0.4

    def velocity(self, x, t, context, proprio):
        at = t[:, None, None]
        variance = (1 - at) ** 2 + (at * self.std) ** 2
        centred = x - at * self.mean
        noise = (1 - at) * centred / variance
        data = self.mean + at * self.std**2 * centred / variance
        return noise - data


@pytest.mark.parametrize("config", NOISY, ids=ids)
def test_log_prob_is_that_of_the_steps_one_by_one(config):
    head, chain, context, proprio = draw(config)
    density, entropy = log_prob(head, config, chain, context, proprio)
    torch.testing.assert_close(chain.log_prob, density, atol=2e-5, rtol=0)
    for row in range(12):
        seen = context[row // 4, None], proprio[row // 4, None]
        expected, randomness = torch.zeros(8, 7), torch.zeros(8, 7)
        for k in chain.noisy_steps[row]:
            x, after = chain.states[row, k, None], chain.states[row, k + 1, None]
            mean, log_sigma = _distribution(head, config, x, k[None], *seen)
            expected += Normal(mean[0], log_sigma[0].exp()).log_prob(after[0])
            randomness += log_sigma[0] + 0.5 * math.log(2 * math.pi * math.e)
        torch.testing.assert_close(density[row], expected, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(entropy[row], randomness / len(chain.noisy_steps[row]))


@pytest.mark.parametrize("config", NOISY, ids=ids)
def test_the_gradient_of_log_prob_is_that_of_finite_differences(config):
    head, chain, context, proprio = draw(config, rows=1, group_size=2)
    head.double()
    chain = Chain(chain.states.double(), chain.noisy_steps, chain.log_prob)
    seen = context.double(), proprio.double()
    weight = head.action_head.final_layer.linear.weight

    def value():
        return log_prob(head, config, chain, *seen)[0].sum()

    (gradient,) = torch.autograd.grad(value(), weight)
    for index in ((0, 0), (3, 5), (6, 15)):
        with torch.no_grad():
            old = weight[index].clone()
            weight[index] = old + 1e-3
            above = value()
            weight[index] = old - 1e-3
            below = value()
            weight[index] = old
        finite = (above - below) / 2e-3
        assert gradient[index].item() == pytest.approx(finite.item(), rel=2e-2, abs=2e-2)


@pytest.mark.parametrize("noise", ["none", "flow_sde"])
def test_marginals_are_those_of_the_data(noise):
    """Whichever way a Gaussian toy is denoised, its mean and spread are those of the data."""
    config = ChainConfig(steps=100, noise=noise, sde_level=1.0)
    toy = GaussianToy()
    actions = draw(config, rows=200, group_size=4, head=toy)[1].actions
    assert actions.mean().item() == pytest.approx(toy.mean, abs=0.01)
    assert actions.std().item() == pytest.approx(toy.std, rel=0.02)


def test_many_noisy_steps_still_have_the_marginals_of_the_data():
    """Every step of a long chain as a step of the SDE, which one noisy step cannot tell apart."""
    config, toy = ChainConfig(steps=200, noise="flow_sde", sde_level=1.0), GaussianToy()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(800, 8, 7, generator=generator)
    x = x - toy.velocity(x, torch.zeros(800), None, None) / config.steps
    for number in range(1, config.steps):
        k = torch.full((800,), number)
        mean, log_sigma = _distribution(toy, config, x, k, None, None)
        x = mean + log_sigma.exp() * torch.randn(x.shape, generator=generator)
    assert x.mean().item() == pytest.approx(toy.mean, abs=0.01)
    assert x.std().item() == pytest.approx(toy.std, rel=0.02)


def test_entropy_is_that_of_samples():
    config = ChainConfig(steps=5)
    head, chain, context, proprio = draw(config, rows=1, group_size=1)
    _, entropy = log_prob(head, config, chain, context, proprio)
    estimates = []
    for k in range(config.steps):
        mean, log_sigma = _distribution(
            head, config, chain.states[:, k], torch.tensor([k]), context, proprio
        )
        step = Normal(mean[0], log_sigma[0].exp())
        with torch.random.fork_rng():
            torch.manual_seed(k)
            estimates.append(-step.log_prob(step.sample((20_000,))).mean(0))
    torch.testing.assert_close(torch.stack(estimates).mean(0), entropy[0], atol=0.02, rtol=0)


def test_what_the_first_observations_get_does_not_depend_on_how_many_follow():
    config = ChainConfig(steps=4)
    head, whole, context, proprio = draw(config, rows=3)
    generator = torch.Generator().manual_seed(0)
    first = sample(head, config, context[:1], proprio[:1], group_size=4, generator=generator)
    torch.testing.assert_close(first.states, whole.states[:4], atol=1e-5, rtol=1e-5)


def test_flow_sde_has_one_noisy_step_and_the_rest_follow_the_flow():
    config = ChainConfig(steps=5, noise="flow_sde")
    head, chain, context, proprio = draw(config, rows=6, group_size=2)
    assert chain.noisy_steps.shape == (12, 1)
    assert 1 <= chain.noisy_steps.min() < chain.noisy_steps.max() <= config.steps - 1
    assert torch.equal(chain.noisy_steps[::2], chain.noisy_steps[1::2])
    for k in range(config.steps):
        x, t = chain.states[:, k], torch.full((12,), k / config.steps)
        with torch.no_grad():
            flow = x - head.velocity(x, t, context, proprio) / config.steps
        follows = (chain.states[:, k + 1] - flow).abs().amax(dim=(1, 2)) < 1e-5
        assert torch.equal(follows, chain.noisy_steps[:, 0] != k)


def test_without_noise_there_is_no_likelihood():
    config = ChainConfig(steps=3, noise="none")
    head, chain, context, proprio = draw(config)
    assert torch.equal(chain.states[:, 0], draw(ChainConfig(steps=3))[1].states[:, 0])
    with pytest.raises(ValueError, match='noise="none" have no likelihood'):
        log_prob(head, config, chain, context, proprio)
    with pytest.raises(ValueError, match="flow_sde needs 2 or more"):
        ChainConfig(steps=1, noise="flow_sde")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 0}, "steps=0: must be >= 1"),
        ({"noise": "flow_sde", "sde_level": 0.0}, "sde_level=0.0: must be > 0"),
        ({"noise": "white"}, "noise='white': allowed are"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        ChainConfig(**changes)
    with pytest.raises(ValueError, match="group_size=0: must be >= 1"):
        draw(ChainConfig(), group_size=0)
