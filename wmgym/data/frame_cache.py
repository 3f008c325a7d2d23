"""All frames of a choice of episodes, decoded once into one memory-mapped array.

Training reads frames at random, many times, and should not decode video each time.
`FrameCache.build` decodes every wanted episode once into `frames.u8`, a raw uint8 array
`(N, H, W, 3)`, and writes proprioception, actions, episode bounds and descriptions into
`index.safetensors`. The folder carries a fingerprint of the data and of the choice: building again
with the same returns at once, with other data builds anew. It appears under its name only when
complete.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wmgym.data.episodes import DatasetError, EpisodeInfo, StoredDataset

_FRAMES = "frames.u8"
_INDEX = "index.safetensors"
_LAYOUT = "2"


@dataclass(frozen=True)
class FrameCache:
    """Decoded episodes laid end to end; `N` steps in all, `E` episodes.

    Attributes:
        frames: `(N, H, W, 3)` uint8, usually memory-mapped and read-only.
        proprio: `(N, 8)` float32.
        actions: `(N, 7)` float32, as executed.
        clean_actions: `(N, 7)` float32, what the expert meant before noise; the executed ones where
            that was not recorded.
        starts: `(E + 1,)` int64, the first step of each episode, and `N`.
        episodes: Descriptions in the same order; `episode_id` counts within its own dataset.
    """

    frames: NDArray[np.uint8]
    proprio: NDArray[np.float32]
    actions: NDArray[np.float32]
    clean_actions: NDArray[np.float32]
    starts: NDArray[np.int64]
    episodes: list[EpisodeInfo]

    def __post_init__(self) -> None:
        """Checks that the arrays agree."""
        total = int(self.starts[-1])
        steps = (self.frames, self.proprio, self.actions, self.clean_actions)
        lengths = {len(array) for array in steps}
        if lengths != {total} or len(self.starts) != len(self.episodes) + 1:
            raise ValueError(
                f"the arrays of steps have {sorted(lengths)} steps, starts has "
                f"{len(self.starts)} entries; expected {total} steps and "
                f"{len(self.episodes) + 1} entries"
            )

    @property
    def image_size(self) -> tuple[int, int]:
        """`(H, W)` in pixels."""
        return self.frames.shape[1], self.frames.shape[2]

    @classmethod
    def build(
        cls,
        datasets: Sequence[StoredDataset],
        path: str | Path,
        *,
        image_size: tuple[int, int] | None = None,
        episode_filter: Callable[[EpisodeInfo], bool] | None = None,
        progress: bool = True,
    ) -> FrameCache:
        """Opens the cache at `path` if it holds just these data, else decodes them into it.

        Only one process at a time may build a path; others open it afterwards.

        Args:
            datasets: Where episodes come from.
            path: Folder of the cache; what another choice of data left there is replaced.
            image_size: `(H, W)` to resize to (antialiased); None keeps the size, which must then be
                the same everywhere.
            episode_filter: Chooses episodes; None takes all.
            progress: Whether a progress bar is shown.

        Raises:
            ValueError: No episode is chosen, or sizes differ without `image_size`.
            DatasetError: A dataset's files are damaged.
        """
        chosen = [
            (source, info)
            for source, dataset in enumerate(datasets)
            for info in dataset.episodes
            if episode_filter is None or episode_filter(info)
        ]
        if not chosen:
            raise ValueError("no episode passes episode_filter; a cache needs at least one")
        path = Path(path)
        fingerprint = _fingerprint(datasets, chosen, image_size)
        if not path.is_dir() or _stored_fingerprint(path) != fingerprint:
            part = path.with_name(path.name + ".part")
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            _decode_into(part, datasets, chosen, image_size, fingerprint, progress)
            shutil.rmtree(path, ignore_errors=True)
            part.replace(path)
        return cls.open(path)

    @classmethod
    def open(cls, path: str | Path) -> FrameCache:
        """Maps a built cache.

        Raises:
            DatasetError: The folder is no cache, or damaged.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        path = Path(path)
        try:
            metadata = _metadata(path)
            arrays = load_file(path / _INDEX)
            starts = arrays["starts"]
            shape = (int(starts[-1]), *json.loads(metadata["image_size"]), 3)
            frames = np.memmap(path / _FRAMES, np.uint8, "r", shape=shape)
            return cls(
                frames=frames,
                proprio=arrays["proprio"],
                actions=arrays["actions"],
                clean_actions=arrays["clean_actions"],
                starts=starts,
                episodes=[EpisodeInfo(**entry) for entry in json.loads(metadata["episodes"])],
            )
        except (OSError, KeyError, ValueError, TypeError, SafetensorError) as error:
            raise DatasetError(
                f"{path} is not a frame cache or damaged: {error}; remove it"
            ) from error


def _decode_into(
    folder: Path,
    datasets: Sequence[StoredDataset],
    chosen: list[tuple[int, EpisodeInfo]],
    image_size: tuple[int, int] | None,
    fingerprint: str,
    progress: bool,
) -> None:
    from safetensors.numpy import save_file
    from tqdm import tqdm

    proprio, actions, clean = [], [], []
    size = image_size
    with (folder / _FRAMES).open("wb") as file:
        for source, info in tqdm(chosen, desc="decoding episodes", disable=not progress):
            episode = datasets[source].read(info.episode_id)
            images = episode.images
            if image_size is not None:
                images = resize(images, image_size)
            if size is None:
                size = (images.shape[1], images.shape[2])
            if images.shape[1:3] != size:
                raise ValueError(
                    f"episode {info.episode_id} has images of {images.shape[1:3]} pixels, those "
                    f"before it {size}; pass image_size=(H, W)"
                )
            file.write(np.ascontiguousarray(images).data)
            proprio.append(episode.proprio)
            actions.append(episode.actions)
            meant = episode.clean_actions
            clean.append(episode.actions if meant is None else meant)
    arrays = {
        "proprio": np.concatenate(proprio),
        "actions": np.concatenate(actions),
        "clean_actions": np.concatenate(clean),
        "starts": np.cumsum([0, *map(len, actions)], dtype=np.int64),
    }
    metadata = {
        "fingerprint": fingerprint,
        "image_size": json.dumps(size),
        "episodes": json.dumps([dataclasses.asdict(info) for _, info in chosen]),
    }
    save_file(arrays, folder / _INDEX, metadata)


def resize(images: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Images `(N, H, W, 3)` at `(H, W) = size`, bilinear with antialiasing."""
    from PIL import Image

    if images.shape[1:3] == tuple(size):
        return images
    scaled = (Image.fromarray(i).resize(size[::-1], Image.Resampling.BILINEAR) for i in images)
    return np.stack([np.asarray(image) for image in scaled])


def _fingerprint(
    datasets: Sequence[StoredDataset],
    chosen: list[tuple[int, EpisodeInfo]],
    image_size: tuple[int, int] | None,
) -> str:
    parts = [_LAYOUT, image_size, chosen, *(dataset.fingerprint() for dataset in datasets)]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path / _INDEX, "numpy") as file:
        return file.metadata()


def _stored_fingerprint(path: Path) -> str:
    """The fingerprint of a complete cache, or nothing."""
    try:
        cache = FrameCache.open(path)
    except DatasetError:
        return ""
    return _metadata(path)["fingerprint"] if len(cache.episodes) else ""
