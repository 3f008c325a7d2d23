"""Which episodes stand for a dataset."""

from __future__ import annotations

import pytest

from wmgym.data.episodes import EpisodeInfo
from wmgym.data.selection import representative


def episode(number: int, task: int, state: int, success: bool | None = True) -> EpisodeInfo:
    return EpisodeInfo(number, 10, "", "suite", task, state, success=success)


EPISODES = [
    episode(0, 0, 3, success=False),
    episode(1, 0, 4),
    episode(2, 1, 40),
    episode(3, 0, 5, success=None),
    episode(4, 1, 6),
    episode(5, 0, 49, success=False),
    episode(6, 0, 7),
    episode(7, 1, 8),
]


def test_held_out_episodes_are_all_kept():
    assert representative(EPISODES, 0) == [2, 5]


def test_successful_ones_come_first_and_in_order():
    assert representative(EPISODES, 1) == [1, 2, 4, 5]
    assert representative(EPISODES, 2) == [1, 2, 3, 4, 5, 7]
    assert representative(EPISODES, 3) == [1, 2, 3, 4, 5, 6, 7]
    assert representative(EPISODES, 99) == list(range(8))


def test_tasks_of_other_suites_are_other_tasks():
    other = EpisodeInfo(8, 10, "", "other suite", 0, 3)
    assert representative([*EPISODES, other], 1) == [1, 2, 4, 5, 8]


def test_nothing_comes_of_nothing_and_negative_numbers_are_refused():
    assert representative([], 3) == []
    with pytest.raises(ValueError, match="per_task=-1"):
        representative(EPISODES, -1)


def test_where_initial_states_are_unknown_every_tenth_episode_is_kept():
    episodes = [EpisodeInfo(i, 9, "task") for i in range(40)]
    assert [e.episode_id for e in episodes if e.held_out] == [9, 19, 29, 39]
    assert [e.episode_id for e in episodes if e.validates((25,))] == [4, 14, 24, 34]
    known = [EpisodeInfo(i, 9, "task", init_state_id=i) for i in range(50)]
    assert [e.episode_id for e in known if e.held_out] == list(range(40, 50))
    assert [e.episode_id for e in known if e.validates((25, 30))] == [25, 30]
