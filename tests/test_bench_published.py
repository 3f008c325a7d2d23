"""The benchmark of the published world: what it compares agrees, and its figures add up."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import mended_torchvision  # noqa: F401 - before transformers imports it
import pytest

from wmgym.bench_published import BenchPublishedConfig, bench_published
from wmgym.extras import MissingExtraError

sys.path.insert(0, str(Path(__file__).parent / "worlds" / "tokens"))
from published_tiny import DYNAMICS, TOKENIZER, filled, save

from wmgym.reports import memory_table, published_table, write_report
from wmgym.worlds import CompressiveTokenizer, TokenDynamics


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """64 px, so that LPIPS can look at it."""
    folder = save(tmp_path_factory.mktemp("published"))
    config = dataclasses.replace(TOKENIZER, resolution=64)
    filled(CompressiveTokenizer(config)).save_pretrained(folder / "tokenizer")
    shallow = dataclasses.replace(DYNAMICS, num_hidden_layers=1)
    filled(TokenDynamics(shallow)).save_pretrained(folder)
    return folder


def test_peers_generate_the_same_tokens(world, tmp_path):
    said = []
    config = BenchPublishedConfig(
        world=str(world), members=2, frames=2, repeats=2, dtypes=("float32",), device="cpu"
    )
    report = bench_published(config, said.append)
    figures = report["cpu"]["float32"]
    assert figures["same_tokens"] == 1
    assert figures["different_frames"] > 3
    assert list(figures["ways"]) == ["ours", "generate", "reprefill"]
    for way in figures["ways"].values():
        parts = ("encoding", "generation", "drawing", "rewards")
        assert sum(way[part] for part in parts) == pytest.approx(way["total"], rel=0.3)
        assert way["tokens_per_s"] == pytest.approx(3 * 2 * 64 / way["generation"], rel=0.02)
    ours, peer = (figures["ways"][name]["total"] for name in ("ours", "reprefill"))
    assert figures["speedup_vs_reprefill"] == pytest.approx(peer / ours, abs=0.01)
    assert len(said) == 6
    memory = [figures["memory_gib"][str(count)] for count in (16, 64, 256)]
    assert memory == sorted(memory)
    write_report(tmp_path / "bench.json", report, command="wmgym bench-published", seed=0)
    assert "| cpu, float32, 2 x 2 frames: wmgym |" in published_table(tmp_path / "bench.json")
    assert f"| 16 | {memory[0]:.1f} GiB |" in memory_table(tmp_path / "bench.json")


def test_an_unknown_device_is_refused():
    with pytest.raises(ValueError, match="device='tpu': allowed here are"):
        bench_published(BenchPublishedConfig(device="tpu", peers=False))


def test_it_runs_without_peers(world):
    config = BenchPublishedConfig(
        world=str(world), members=1, frames=1, repeats=1, peers=False, device="cpu"
    )
    report = bench_published(config)["cpu"]
    assert list(report) == ["float32", "bfloat16"]
    figures = report["bfloat16"]
    assert list(figures["ways"]) == ["ours"]
    assert "speedup_vs_generate" not in figures


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"frames": 9}, "at most 8"),
        ({"repeats": 0}, "repeats=0"),
        ({"dtypes": ("float16",)}, "allowed are"),
        ({"dtypes": ()}, "allowed are"),
    ],
)
def test_what_cannot_be_measured_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        BenchPublishedConfig(**wrong)


def test_peers_that_cannot_be_loaded_are_missed_before_anything_is_made(monkeypatch):
    class Broken:
        __spec__ = None

        def __getattr__(self, name):
            raise ModuleNotFoundError(f"Could not import module '{name}'")

    monkeypatch.setitem(sys.modules, "transformers", Broken())
    with pytest.raises(MissingExtraError, match="torchvision"):
        bench_published(BenchPublishedConfig(frames=1))
