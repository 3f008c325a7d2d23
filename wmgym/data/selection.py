"""Which episodes stand for a dataset when it must be small."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from wmgym.data.episodes import EpisodeInfo


def representative(episodes: Sequence[EpisodeInfo], per_task: int) -> list[int]:
    """Ids of all held-out episodes and of `per_task` training ones of every task, in order.

    Training episodes that succeeded come first, in their own order.

    Raises:
        ValueError: `per_task` is negative.
    """
    if per_task < 0:
        raise ValueError(f"per_task={per_task}: allowed are integers >= 0")
    by_task: dict[tuple[str, int], list[EpisodeInfo]] = defaultdict(list)
    for info in episodes:
        if not info.held_out:
            by_task[info.suite, info.task_id].append(info)
    chosen = {info.episode_id for info in episodes if info.held_out}
    for group in by_task.values():
        group.sort(key=lambda info: (info.success is False, info.episode_id))
        chosen.update(info.episode_id for info in group[:per_task])
    return sorted(chosen)
