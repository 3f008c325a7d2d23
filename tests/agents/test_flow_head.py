"""The flow head is the published one: its keys, its number of parameters and its outputs."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from wmgym_agents.flow_head import FlowHead, HeadConfig

ORACLE = Path(__file__).parents[1] / "oracle"
PREFIXES = {
    "action_head": "flow_predictor.dit.",
    "sigma_net": "std_predictor.dit.",
    "noisy_action_projector": "",
    "proprio_projector": "",
}
SMALL = HeadConfig(context=24, embed=8, width=16, depth=3, heads=2)


@pytest.fixture(scope="module")
def fixture():
    with np.load(ORACLE / "flow_head.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def published(fixture):
    """A head of the published shape with the oracle's weights."""
    sys.path.insert(0, str(ORACLE))
    from fill import fill

    keys = json.loads((ORACLE / "flow_head.keys.json").read_text())
    head = FlowHead(HeadConfig()).eval()
    ours = {name: tuple(t.shape) for name, t in head.state_dict().items()}
    weights = {}
    for module, shapes in keys.items():
        for key, shape in shapes.items():
            name = f"{module}.{key.removeprefix(PREFIXES[module])}"
            if "kept" not in shape:
                weights[name] = torch.from_numpy(
                    fill(f"{module}.{key}", tuple(shape), str(fixture["salt"]))
                )
    kept = {"action_head.temp_embed", "sigma_net.temp_embed"}
    kept |= {"noise_head.weight", "noise_head.bias"}  # ours
    assert ours.keys() - kept == weights.keys()
    head.load_state_dict(weights, strict=False)
    return head


def random_head(seed=0, config=SMALL):
    """A small head whose output depends on all of its inputs."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = FlowHead(config)
        with torch.no_grad():
            for weight in head.parameters():
                if weight.requires_grad:
                    weight.add_(torch.randn_like(weight) * 0.2)
    return head.eval()


def inputs(rows, observations, seed=0, config=SMALL):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, config.chunk, 7, generator=generator),
        torch.rand(rows, generator=generator),
        torch.randn(observations, 5, config.context, generator=generator),
        torch.rand(observations, 8, generator=generator) * 2 - 1,
    )


@pytest.mark.parametrize("sigma", [(0.2, 0.08), (0.0, 0.2), (0.1, float("inf"))])
def test_bounds_that_do_not_fit_are_refused(sigma):
    with pytest.raises(ValueError, match="0 < smallest < largest"):
        HeadConfig(sigma=sigma)


def test_the_published_size():
    with torch.device("meta"):
        head = FlowHead(HeadConfig())
    assert sum(p.numel() for p in head.action_head.parameters()) == 51_293_191
    assert sum(p.numel() for p in head.noisy_action_projector.parameters()) == 805_504
    assert sum(p.numel() for p in head.proprio_projector.parameters()) == 811_776


@pytest.mark.parametrize("t", [0.0, 0.3, 0.9])
def test_outputs_are_those_of_the_original(t, published, fixture):
    key = hashlib.sha256(str(fixture["context_seed"]).encode()).digest()[:8]
    stream = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
    context = stream.standard_normal((2, 1, 320, 896), dtype=np.float32)
    assert np.array_equal(context[0, 0, 0], fixture["context_first_row"])
    asked = (
        torch.from_numpy(fixture["noisy_actions"]),
        torch.full((2,), t),
        torch.from_numpy(context[:, 0]),
        torch.from_numpy(fixture["proprio"]),
    )
    with torch.no_grad():
        velocity = published.velocity(*asked)
        sigma = published.log_sigma(*asked).exp()
    np.testing.assert_allclose(velocity, fixture[f"flow_t{t}"], rtol=0, atol=0.05)
    np.testing.assert_allclose(sigma, fixture[f"sigma_t{t}"], rtol=0, atol=0.005)


def test_an_untrained_head_has_no_velocity_and_the_middle_sigma():
    head = FlowHead(SMALL)
    assert torch.equal(head.velocity(*inputs(4, 4)), torch.zeros(4, 8, 7))
    sigma = head.log_sigma(*inputs(4, 4)).exp()
    torch.testing.assert_close(sigma, torch.full_like(sigma, (0.08 * 0.2) ** 0.5))


def test_chunks_that_share_an_observation_are_served_as_if_each_had_its_own():
    head = random_head()
    x, t, context, proprio = inputs(6, 2)
    shared = head.velocity(x, t, context, proprio)
    own = head.velocity(x, t, context.repeat_interleave(3, 0), proprio.repeat_interleave(3, 0))
    torch.testing.assert_close(shared, own, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="5 chunks cannot share 2 observations"):
        head.velocity(x[:5], t[:5], context, proprio)


def test_every_input_matters_and_rows_do_not_mix():
    head = random_head()
    x, t, context, proprio = inputs(3, 3)
    base = head.velocity(x, t, context, proprio)
    for number, changed in enumerate((x + 0.1, t * 0.5, context + 0.1, proprio * 0.5)):
        given = [x, t, context, proprio]
        given[number] = given[number].clone()
        given[number][1] = changed[1]
        moved = (head.velocity(*given) - base).abs().amax(dim=(1, 2))
        assert moved[1] > 1e-4
        torch.testing.assert_close(moved[[0, 2]], torch.zeros(2), atol=1e-6, rtol=0)
