"""The demonstration and the benchmark on a small world and the shipped demonstrations."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import small
import torch
import toy

from wmgym.bench import BenchConfig, bench
from wmgym.demo import NOISE, RANDOM, REFERENCE, DemoConfig, chunks, demo, kinds
from wmgym.timing import Timer, peak_memory

REWARDS = ("R1", "R2", "R3")


@pytest.fixture(scope="module")
def shown(tiny_world, tmp_path_factory):
    out, lines = tmp_path_factory.mktemp("out") / "videos", []
    policy = tmp_path_factory.mktemp("policies") / "policy"
    small.policy().save_pretrained(policy)
    config = DemoConfig(
        world=str(tiny_world), out=out, starts=3, horizon=4, policy=str(policy), steps=2
    )
    return demo(config, lines.append), lines, out


def test_the_reference_scores_exactly_zero_where_it_must(shown):
    table, _, _ = shown
    assert list(table) == kinds()
    assert table[REFERENCE]["R3"] == 0
    assert table[REFERENCE]["R1"] == 0
    assert table[REFERENCE]["R2"] < 0


def test_more_noise_is_less_reward(shown):
    table, _, _ = shown
    assert [list(row) for row in table.values()] == [list(REWARDS)] * 5
    for reward in ("R1", "R3"):
        noisy = [table[kind][reward] for kind in kinds()[1:-1]]
        assert 0 > noisy[0] > noisy[1] > noisy[2]
        assert table[RANDOM][reward] < noisy[0]


def test_the_table_and_the_videos_are_shown(shown):
    table, lines, out = shown
    text = "\n".join(lines)
    for kind, row in table.items():
        assert any(line.startswith(kind) and f"{row['R3']:.4f}" in line for line in lines)
    assert "imagined frames per second" in text
    videos = sorted(out.glob("*.mp4"))
    assert len(videos) == 5
    for video in videos:
        assert str(video) in text
        assert video.stat().st_size > 1000


def test_the_policy_is_trained_and_its_reward_told(shown):
    _, lines, _ = shown
    told = [line for line in lines if line.startswith("step")]
    assert [line.split(":")[0] for line in told] == ["step   0", "step   2"]
    assert all(float(line.split()[-1]) < 0 for line in told)


def test_chunks_leave_the_reference_alone_and_disturb_the_others():
    reference = np.random.default_rng(0).uniform(-1, 1, (50 * len(kinds()), 4, 7))
    reference = reference.astype(np.float32)
    before = reference.copy()
    actions = chunks(reference, np.random.default_rng(1))
    np.testing.assert_array_equal(reference, before)
    assert np.abs(actions).max() <= 1
    off = np.abs(actions - reference).reshape(50, len(kinds()), -1).mean((0, 2))
    assert off[0] == 0
    assert (np.diff(off[: 1 + len(NOISE)]) > 0).all()
    assert off[-1] > 0.5
    np.testing.assert_array_equal(actions, chunks(reference, np.random.default_rng(1)))


# --- benchmark ----------------------------------------------------------------------------------


def test_a_benchmark_without_the_simulator_reports_rate_and_split(tiny_world):
    config = BenchConfig(
        world=str(tiny_world),
        num_envs=4,
        group_size=2,
        action_chunk=4,
        repeats=2,
        dtype="float32",
        device="cpu",
    )
    figures = bench(config, libero=False)
    assert figures["imagined_steps_per_s"] > 0
    assert len(figures["repeats"]["imagined_steps_per_s"]) == 2
    assert set(figures["split"]) == {"dynamics", "drawing", "lpips", "rest"}
    assert sum(figures["split"].values()) == pytest.approx(1, abs=1e-3)
    assert all(share > 0 for share in figures["split"].values())
    assert (figures["num_envs"], figures["action_chunk"]) == (4, 4)
    assert "ratio" not in figures


def test_a_published_world_has_a_benchmark_of_its_own(monkeypatch):
    monkeypatch.setattr("wmgym.envs.vector.resolve_world", lambda *given: toy.ToyWorld())
    with pytest.raises(ValueError, match="`wmgym bench-published` measures those"):
        bench(BenchConfig(num_envs=4, group_size=2, device="cpu"), libero=False)


def test_timing_adds_up_and_leaves_no_trace():
    layer, timer = torch.nn.Linear(2, 2), Timer(torch.device("cpu"))
    x = torch.ones(1, 2)
    with timer("all"), timer.method(layer, "forward", "layer"):
        first = layer(x)
        once = timer.seconds["layer"]
        layer(x)
    assert 0 < once < timer.seconds["layer"] < timer.seconds["all"]
    assert "forward" not in vars(layer)
    assert torch.equal(layer(x), first)
    assert set(timer.read()) == {"layer_s", "all_s"}
    assert timer.read() == {}


def test_memory_is_watched_until_the_block_ends():
    threads = threading.active_count()
    with peak_memory(torch.device("cpu")) as peak:
        kept = torch.ones(2**26)
        time.sleep(0.1)
    assert peak() > 0.1
    del kept
    with pytest.raises(MemoryError), peak_memory(torch.device("cpu")):
        raise MemoryError
    assert threading.active_count() == threads
