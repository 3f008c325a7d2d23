"""The policy: what it sees, what it does, and its folder."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import small
import torch
from wmgym_agents.encoder import hashed_pieces
from wmgym_agents.policy import CONFIG, STATISTICS, WEIGHTS, FlowVLA

from wmgym.checkpoints import CheckpointError
from wmgym.data.statistics import VectorStatistics


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normalize_q99(values, s):
    """BOUNDS_Q99 as OpenVLA writes it."""
    scaled = np.clip(2 * (values - s.q01) / (s.q99 - s.q01 + 1e-8) - 1, -1, 1)
    return np.where(s.min == s.max, 0.0, np.where(s.mask, scaled, values))


def unnormalize_q99(values, s):
    """The inverse of `normalize_q99` on values that it did not clip; constants are restored."""
    raw = np.where(s.mask, 0.5 * (values + 1) * (s.q99 - s.q01 + 1e-8) + s.q01, values)
    return np.where(s.min == s.max, s.min, raw)


def test_actions_are_those_of_the_environment():
    policy = small.policy(lively=0.5)
    actions, chain = policy.sample(small.observation(), 5, generator())
    assert actions.shape == (3, 5, 4, 7)
    assert chain.states.shape == (15, 5, 4, 7)
    assert actions.abs().max() <= 1
    assert set(actions[..., 6].unique().tolist()) <= {-1.0, 1.0}
    raw = unnormalize_q99(chain.actions.numpy(), policy.statistics.action)[..., :6]
    np.testing.assert_allclose(
        actions.flatten(0, 1)[..., :6], np.clip(raw, -1, 1), atol=1e-5, rtol=0
    )
    acted = policy.act(small.observation(), generator())
    assert acted.shape == (3, 4, 7)
    assert acted.dtype == np.float32
    assert np.array_equal(acted, policy.act(small.observation(), generator()))
    assert not np.array_equal(acted, policy.act(small.observation(), generator(1)))


def test_scales_are_those_of_the_statistics():
    policy = small.policy()
    values = np.random.default_rng(1).uniform(-1.2, 1.2, (50, 7)).astype(np.float32)
    values[:, 6] = np.sign(values[:, 6])
    ours = policy.action_scale.to_unit(torch.from_numpy(values)).numpy()
    expected = normalize_q99(values, policy.statistics.action)
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_scales_restore_what_they_did_not_clip_and_constants():
    data = np.random.default_rng(0).normal(scale=0.3, size=(500, 7)).astype(np.float32)
    data[:, 4] = 0.3
    statistics = VectorStatistics.of(data, np.arange(7) < 6)
    scale = FlowVLA(
        small.CONFIG, dataclasses.replace(small.statistics(), action=statistics)
    ).action_scale
    inside = np.clip(data, statistics.q01, statistics.q99).astype(np.float32)
    inside[:, 6] = np.sign(inside[:, 6])
    unit = scale.to_unit(torch.from_numpy(inside))
    np.testing.assert_allclose(unit, normalize_q99(inside, statistics), atol=1e-5)
    assert (unit[:, 4] == 0).all()
    restored = scale.from_unit(unit).numpy()
    np.testing.assert_allclose(restored, unnormalize_q99(unit.numpy(), statistics), atol=1e-5)
    np.testing.assert_allclose(restored, inside, atol=1e-5)


def test_the_ratio_of_a_policy_to_itself_is_one():
    policy = small.policy(lively=0.5)
    seen = policy.encode(small.observation())
    _, chain = policy.sample(seen, 6, generator())
    with torch.no_grad():
        whole, _ = policy.log_prob(seen, chain)
        parts = torch.cat(
            [
                policy.log_prob(
                    type(seen)(seen.tokens[i : i + 1], seen.proprio[i : i + 1]),
                    chain.rows(torch.arange(6 * i, 6 * i + 6)),
                )[0]
                for i in range(3)
            ]
        )
        again, _ = policy.log_prob(seen, chain)
    assert torch.equal(whole, again)
    assert ((whole - parts).exp() - 1).abs().max() < 1e-3


def test_everything_seen_matters():
    policy = small.policy(lively=0.5)
    base = policy.act(small.observation(), generator())
    for name, change in (
        ("image", lambda x: 255 - x),
        ("proprio", lambda x: x + 0.5),
        ("instruction", lambda x: ["open the drawer"] * 3),
    ):
        seen = small.observation()
        seen[name] = change(seen[name])
        assert not np.allclose(policy.act(seen, generator()), base, atol=1e-4), name


def test_any_instruction_is_accepted_and_like_words_share_pieces():
    assert hashed_pieces("", 64) == hashed_pieces("...", 64) != []
    a, b, c = (set(hashed_pieces(w, 4096)) for w in ("drawer", "Drawers!", "milk"))
    assert len(a & b) > len(a & c)


def test_wrong_observations_are_refused():
    policy, seen = small.policy(), small.observation()
    for name, value, said in (
        ("image", seen["image"][:, :16], r"expected uint8 \(B, 32, 32, 3\)"),
        ("image", seen["image"].astype(np.float32), "float32"),
        ("proprio", seen["proprio"][:, :7], r"expected \(3, 8\)"),
        ("instruction", "pick up the milk", "a sequence of 3 sentences"),
        ("instruction", ["pick up the milk"], "a sequence of 3 sentences"),
        ("proprio", np.where(seen["proprio"] > 0, np.nan, 0), "NaN or infinity"),
    ):
        with pytest.raises(ValueError, match=said):
            policy.encode({**seen, name: value})


def test_a_folder_holds_the_whole_policy(tmp_path):
    policy = small.policy(lively=0.5)
    policy.save_pretrained(tmp_path / "policy", training={"steps": 7})
    loaded = FlowVLA.from_pretrained(tmp_path / "policy")
    seen = small.observation()
    assert np.array_equal(policy.act(seen, generator()), loaded.act(seen, generator()))
    assert loaded.config == policy.config
    assert json.loads((tmp_path / "policy" / CONFIG).read_text())["training"] == {"steps": 7}
    assert not list(tmp_path.glob("**/*.part"))


def test_damaged_and_foreign_policies_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="'nowhere' is neither a folder nor one of"):
        FlowVLA.from_pretrained("nowhere")
    for name, spoil, said in (
        (
            "truncated",
            lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:99]),
            WEIGHTS,
        ),
        ("no-weights", lambda f: (f / WEIGHTS).unlink(), "is missing"),
        ("no-statistics", lambda f: (f / STATISTICS).unlink(), "does not describe a policy"),
        ("not-json", lambda f: (f / CONFIG).write_text("{"), "is damaged"),
        ("empty", lambda f: (f / CONFIG).unlink(), "is no policy: it has no config.json"),
        ("foreign", lambda f: (f / CONFIG).write_text('{"family": "gpt"}'), "family='gpt'"),
    ):
        folder = tmp_path / name
        small.policy().save_pretrained(folder)
        spoil(folder)
        with pytest.raises(CheckpointError, match=said):
            FlowVLA.from_pretrained(folder)


def test_a_published_folder_names_the_command_that_imports_it(tmp_path):
    (tmp_path / CONFIG).write_text('{"model_type": "openvla"}')
    (tmp_path / "action_head--150000_checkpoint.pt").touch()
    with pytest.raises(CheckpointError, match=f"`wmgym import-policy {tmp_path} OUT`"):
        FlowVLA.from_pretrained(tmp_path)


def test_weights_that_are_not_finite_are_not_written(tmp_path):
    policy = small.policy()
    policy.save_pretrained(tmp_path)
    before = (tmp_path / WEIGHTS).read_bytes()
    with torch.no_grad():
        policy.head.noise_head.bias[0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"head\.noise_head\.bias"):
        policy.save_pretrained(tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == before


def test_an_episode_draws_from_the_seed_it_was_begun_with():
    policy, seen = small.policy(), small.observation(1)
    with pytest.raises(ValueError, match=r"call reset\(seed\) first"):
        policy.act(seen)
    episodes = []
    for seed in (3, 4, 3):
        policy.reset(seed)
        episodes.append([policy.act(seen) for _ in range(2)])
    np.testing.assert_array_equal(episodes[0], episodes[2])
    assert not np.array_equal(episodes[0], episodes[1])
    assert not np.array_equal(*episodes[0])
    source = generator(3)
    np.testing.assert_array_equal(episodes[0], [policy.act(seen, source) for _ in range(2)])


@pytest.mark.parametrize("temperature", [-0.1, float("nan"), float("inf")])
def test_temperatures_that_mean_nothing_are_refused(temperature):
    with pytest.raises(ValueError, match="must be finite and >= 0"):
        small.policy().act(small.observation(), generator(), temperature)


def test_the_share_of_clipped_numbers_is_that_of_the_environments_range():
    policy = small.policy(lively=0.5)
    actions = torch.randn(5, 4, 7, generator=generator()) * 2
    raw = unnormalize_q99(actions.numpy(), policy.statistics.action)[..., :6]
    assert policy.clipped(actions).item() == pytest.approx((np.abs(raw) > 1).mean())


def test_names_of_the_package_are_those_of_its_modules():
    """Functions are not hidden by modules of their name, whoever imported these before."""
    import importlib

    import wmgym_agents

    modules = {name: importlib.import_module(f"wmgym_agents.{name}") for name in ("grpo", "sft")}
    for name, module in modules.items():
        assert getattr(wmgym_agents, name) is getattr(module, name)
    assert wmgym_agents.FlowVLA is FlowVLA
    assert set(wmgym_agents.__all__) == set(dir(wmgym_agents))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = wmgym_agents.nothing


def test_at_temperature_zero_the_seed_decides_nothing():
    policy, seen = small.policy(), small.observation(2)
    chunks = {
        temperature: [
            policy.act(seen, torch.Generator().manual_seed(seed), temperature) for seed in (0, 1)
        ]
        for temperature in (0.0, 0.5, 1.0)
    }
    np.testing.assert_array_equal(*chunks[0.0])
    apart = [np.abs(one - other).mean() for one, other in chunks.values()]
    assert 0 == apart[0] < apart[1] < apart[2]
    alone = policy.act(seen, [torch.Generator().manual_seed(seed) for seed in (0, 0)])
    assert alone.shape == (2, 4, 7)
