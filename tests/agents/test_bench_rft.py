"""One RFT step of the preset `vla-adapter` in a published world, both small."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import tiny_vla
from wmgym_agents.bench import BenchRFTConfig, bench_rft

sys.path.insert(0, str(Path(__file__).parents[1] / "worlds" / "tokens"))
import published_tiny


def networks(seed):
    config = dataclasses.replace(published_tiny.TOKENIZER, resolution=64)
    return published_tiny.tokenizer(config), published_tiny.dynamics()


def test_a_step_of_everything_published(tmp_path):
    shape = tiny_vla.config(tiny_vla.write_tokenizer(tmp_path))
    config = BenchRFTConfig(starts=2, members=2, steps=2, dtype="float32")
    figures = bench_rft(config, shape=shape, networks=networks)
    first, second = figures["steps"]
    assert first["reward"] < 0
    assert first["reward_std"] > 0
    assert second["gradient_action_head"] > 0
    assert all(step["rollout_s"] > 0 and step["update_s"] > 0 for step in figures["steps"])
    counts = figures["parameters"]
    assert 0.99 * counts["head"] < counts["trained"] < counts["head"]  # positions are fixed
    assert counts["policy"] > counts["head"]
    assert counts["world"] == pytest.approx(
        sum(sum(w.numel() for w in m.parameters()) for m in networks(0))
    )
