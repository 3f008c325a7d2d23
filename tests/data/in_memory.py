"""A dataset of given episodes, and a program that writes one as RLDS to be killed."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from pathlib import Path

import numpy as np
from coded_episodes import make_episode

from wmgym.data import write_rlds


class InMemory:
    """A dataset of given episodes."""

    def __init__(self, episodes):
        self._given = episodes
        self.episodes = [
            dataclasses.replace(episode.info, episode_id=i) for i, episode in enumerate(episodes)
        ]

    def read(self, episode_id, start=0, stop=None, *, wrist=False):
        given = self._given[episode_id]
        pieces = {
            field.name: value[start:stop]
            for field in dataclasses.fields(given)
            if isinstance(value := getattr(given, field.name), np.ndarray)
        }
        if not wrist:
            pieces["wrist_images"] = None
        return dataclasses.replace(given, info=self.episodes[episode_id], start=start, **pieces)

    def fingerprint(self):
        numbers = b"".join(episode.actions.tobytes() for episode in self._given)
        return hashlib.sha256(numbers).hexdigest()


def write(out: Path) -> Path:
    """Writes twelve episodes in twelve shards."""
    dataset = InMemory([make_episode(i, 60) for i in range(12)])
    return write_rlds(dataset, out, wrist=True, episodes_per_shard=1, progress=False)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
