"""Puts this folder on the path, so that tests share `toy` and `tiny`; fixtures made of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from wmgym.extras import keep_tensorflow_out

keep_tensorflow_out()  # before stable-baselines3 loads TensorBoard


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small LeRobot dataset that a small world can learn."""
    from tiny import write_dataset

    return write_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small world with random weights."""
    from tiny import model

    from wmgym.worlds.checkpoints import save_world

    folder = tmp_path_factory.mktemp("worlds") / "tiny"
    save_world(folder, model())
    return folder
