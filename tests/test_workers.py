"""Worker processes: who does what, and what becomes of them when their parent is killed."""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path

import pytest
from programs import kill_when

from wmgym.workers import in_workers


def who(job):
    """A job of a group, which may have to wait for a file of another one."""
    group, number, *awaited = job
    deadline = time.monotonic() + 60
    while any(not path.exists() for path in awaited):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return os.getpid(), group, number


def touch(job):
    group, number, folder = job
    told = who((group, number, *([folder / "b5"] if (group, number) == ("b", 0) else [])))
    (folder / f"{group}{number}").touch()
    return told


def first(job):
    return job[0]


def alive(pid):
    """Whether a process runs; one that nobody has waited for yet does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rsplit(")", 1)[1].split()[0] != "Z"


def test_workers_stay_with_their_group():
    jobs = [(group, number) for group in "ab" for number in range(6)]
    done = list(in_workers(who, jobs, 2, first))
    assert sorted((group, number) for _, group, number in done) == sorted(jobs)
    workers = {group: {pid for pid, at, _ in done if at == group} for group in "ab"}
    assert len(set.union(*workers.values())) == 2
    assert sum(map(len, workers.values())) <= 3
    for pid in set.union(*workers.values()):
        for group in "ab":
            mine = [number for worker, at, number in done if (worker, at) == (pid, group)]
            assert mine == sorted(mine)


def test_idle_workers_help_with_the_largest_group(tmp_path):
    """The first job of a group waits for its last one, which another worker must do."""
    jobs = [("a", 0, tmp_path), *(("b", number, tmp_path) for number in range(6))]
    done = list(in_workers(touch, jobs, 2, first))
    assert len({pid for pid, group, _ in done if group == "b"}) == 2
    assert done[-1][1:] == ("b", 0)


def test_results_come_one_by_one():
    results = in_workers(who, [("a", number) for number in range(3)], 1)
    assert next(results)[2] == 0
    assert [number for *_, number in results] == [1, 2]
    assert list(in_workers(who, [], 2)) == []


def level(_):
    return logging.getLogger("robosuite_logs").getEffectiveLevel()


def test_the_simulator_s_advice_does_not_run_through_progress_bars():
    assert list(in_workers(level, [0], 1)) == [logging.ERROR]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")
def test_workers_die_with_their_parent(tmp_path):
    command = [sys.executable, Path(__file__).with_name("orphans.py"), tmp_path]
    kill_when(command, lambda: len(list(tmp_path.glob("*.pid"))) == 2, alone=True)
    workers = [int(path.read_text()) for path in tmp_path.glob("*.pid")]
    deadline = time.monotonic() + 30
    while any(map(alive, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
