"""Worlds and datasets by name, loaded once a process.

A thousand environments of one world share its weights: the caches below are keyed by what decides
the loaded object, so `gym.make` in a loop or a vector of single environments costs no memory. When
its files were written is part of that: what was trained or edited since is loaded anew.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

import torch

from wmgym.assets import asset_path
from wmgym.checkpoints import shipped
from wmgym.data.episodes import Dataset, StoredDataset
from wmgym.data.opening import index_file, open_dataset
from wmgym.distributed import resolve_device
from wmgym.worlds.world import DTYPES, World


def resolve_world(
    world: str | os.PathLike[str] | World, device: str | torch.device, dtype: str
) -> World:
    """A world by name or folder, or the object itself.

    Args:
        world: Name of a shipped world, a checkpoint folder, an id on the hub, or anything with the
            `World` protocol.
        device: "cpu", "cuda", "auto" or a torch device; an object stays where it is.
        dtype: "float32" or "bfloat16", of the networks; an object stays as it is.

    Raises:
        ValueError: Unknown dtype, or no such device here.
        TypeError: Neither a name nor a `World`.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: allowed are {', '.join(map(repr, DTYPES))}")
    if isinstance(world, (str, os.PathLike)):
        from wmgym.worlds.checkpoints import world_files, world_folder

        name = os.fspath(world)
        written = tuple(
            (path, _written(path)) for path in world_files(world_folder(name).resolve())
        )
        if Path(name).is_dir() and name not in shipped("world"):
            name = str(Path(name).resolve())
        return _load_world(name, written, resolve_device(device), dtype)
    needed = (*World.__annotations__, "start", "step", "select")
    missing = [name for name in needed if not hasattr(world, name)]
    if missing:
        raise TypeError(
            f"world={world!r} lacks {missing}: give the name of a world, a checkpoint folder, or "
            "an object with all attributes and methods of wmgym.worlds.world.World"
        )
    return world


def resolve_dataset(dataset: str | os.PathLike[str] | Dataset | None, suite: str) -> Dataset:
    """A dataset by its folder, the object itself, or for None the shipped one of `suite`.

    Raises:
        ValueError: No demonstrations of `suite` ship with wmgym, or the folder holds no dataset.
        TypeError: Neither a path nor a `Dataset`.
    """
    if dataset is None:
        demos = {path.name: path for path in sorted(asset_path("demos").iterdir())}
        if suite not in demos:
            raise ValueError(
                f"suite={suite!r}: demonstrations ship for {', '.join(map(repr, demos))}; for "
                "others pass dataset=<folder>, made with `wmgym record --suite ... --out <folder>`"
            )
        dataset = demos[suite]
    if isinstance(dataset, (str, os.PathLike)):
        root = Path(dataset).resolve()
        return _load_dataset(root, _written(index_file(root)))
    if isinstance(dataset, Dataset):
        return dataset
    raise TypeError(
        f"dataset={dataset!r}: give a folder of a LeRobot v3 or RLDS dataset, or an object with "
        "the attributes and methods of wmgym.data.episodes.Dataset"
    )


def contents_of(
    world: str | os.PathLike[str] | World,
    dataset: str | os.PathLike[str] | Dataset | None,
    suite: str,
) -> dict[str, str]:
    """What changes when the files of a world or of demonstrations do; arguments as above.

    Returns:
        `world_digest` and `data_fingerprint`; of objects that are not read from files, neither.
    """
    found = {}
    if isinstance(world, (str, os.PathLike)):
        from wmgym.worlds.checkpoints import world_digest

        found["world_digest"] = world_digest(os.fspath(world))
    demonstrations = resolve_dataset(dataset, suite)
    if isinstance(demonstrations, StoredDataset):
        found["data_fingerprint"] = demonstrations.fingerprint()[:16]
    return found


def _written(path: Path) -> int:
    """When a file was last written, in ns; 0 if it is missing, which loading then says."""
    return path.stat().st_mtime_ns if path.exists() else 0


@lru_cache(maxsize=4)
def _load_world(
    world: str | Path, written: tuple[tuple[Path, int], ...], device: torch.device, dtype: str
) -> World:
    from wmgym.worlds.checkpoints import load_world

    return load_world(world, device=device, dtype=dtype)


@lru_cache(maxsize=8)
def _load_dataset(root: Path, written: int) -> Dataset:
    return open_dataset(root)
