from __future__ import annotations

from pathlib import Path

import published_rlds
import pytest
from coded_episodes import LENGTHS, make_episode

from wmgym.data.episodes import Episode
from wmgym.data.lerobot_writer import assemble, stage_episode


@pytest.fixture(scope="session")
def episodes() -> list[Episode]:
    return [make_episode(i, n) for i, n in enumerate(LENGTHS)]


@pytest.fixture(scope="session")
def staging(tmp_path_factory: pytest.TempPathFactory, episodes: list[Episode]) -> Path:
    folder = tmp_path_factory.mktemp("staging")
    for i, episode in enumerate(episodes):
        stage_episode(folder, f"episode-{i}", episode)
    return folder


@pytest.fixture(scope="session", params=[1, 3, 50], ids=lambda n: f"{n}-per-file")
def root(request, tmp_path_factory: pytest.TempPathFactory, staging: Path) -> Path:
    """The same dataset with one, with several and with all episodes in one file."""
    out = tmp_path_factory.mktemp("datasets") / "dataset"
    names = [f"episode-{i}" for i in range(len(LENGTHS))]
    return assemble(staging, out, names, episodes_per_file=request.param)


@pytest.fixture(scope="session")
def joined_root(tmp_path_factory: pytest.TempPathFactory, staging: Path) -> Path:
    names = [f"episode-{i}" for i in range(len(LENGTHS))]
    return assemble(staging, tmp_path_factory.mktemp("joined") / "dataset", names)


@pytest.fixture(scope="session")
def published_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The version folder of a dataset in the specification of the modified LIBERO data."""
    folder = tmp_path_factory.mktemp("published") / "libero_object_no_noops" / "1.0.0"
    return published_rlds.write(folder)
