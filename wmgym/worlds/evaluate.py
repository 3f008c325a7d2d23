"""How good a world's pictures are: open loop, by default on episodes it has never seen.

From random frames of episodes the world imagines `T` control steps under the recorded
actions. Each imagined frame is compared with the recorded one by MSE, PSNR, SSIM and LPIPS, beside
two bounds: copying the context frame (what a world must beat) and the tokenizer's own redrawing of
the recorded frame (what the dynamics could reach at best).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from wmgym.data import Dataset, StoredDataset, open_dataset
from wmgym.data.episodes import SPLITS, EpisodeInfo, Split
from wmgym.data.frame_cache import resize
from wmgym.rewards.perceptual import LPIPS
from wmgym.worlds.metrics import mse, psnr, ssim
from wmgym.worlds.world import World

METRICS = ("mse", "psnr", "ssim", "lpips")
MAX_PSNR = 60.0
"""Most that a picture counts in a mean, dB: rounding to 8 bits costs as much (58.9 dB), and equal
pictures would make it infinite."""

_BATCH = 8


def random_starts(
    episodes: Iterable[EpisodeInfo], horizon: int, count: int, rng: np.random.Generator
) -> list[tuple[int, int]]:
    """Up to `count` random `(episode_id, t)` with `horizon` steps left, sorted as the episodes."""
    places = [(info.episode_id, t) for info in episodes for t in range(info.length - horizon)]
    chosen = rng.choice(len(places), size=min(count, len(places)), replace=False)
    return [places[i] for i in sorted(chosen)]


def split_starts(
    dataset: StoredDataset, horizon: int, count: int, seed: int, split: Split = "held_out"
) -> list[tuple[int, int]]:
    """`count` random `(episode_id, t)` of a split with `horizon` steps left, sorted.

    Raises:
        ValueError: An unknown split, or no episode of it is that long.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: allowed are {SPLITS}")
    episodes = [info for info in dataset.episodes if info.is_in(split)]
    places = random_starts(episodes, horizon, count, np.random.default_rng(seed))
    if not places:
        raise ValueError(
            f"{dataset.root} has no episode longer than {horizon} steps in split={split!r}"
        )
    return places


def read_windows(
    dataset: Dataset,
    places: Sequence[tuple[int, int]],
    horizon: int,
    *,
    context: int,
    image_size: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Frames `(B, C + T, 3, H, W)` in [0, 1], proprio `(B, C + T, 8)`, actions `(B, T, 7)`.

    Frames and proprio are of the steps `t - C + 1 ... t + T`, the past clamped to the first step of
    the episode; the actions start at `t`.
    """
    frames, proprio, actions = [], [], []
    for episode_id, t in places:
        first = max(t - context + 1, 0)
        piece = dataset.read(episode_id, first, t + horizon + 1)
        rows = np.maximum(np.arange(t - context + 1, t + horizon + 1), first) - first
        frames.append(resize(piece.images, image_size)[rows])
        proprio.append(piece.proprio[rows])
        actions.append(piece.actions[t - first : t - first + horizon])
    return _images(np.stack(frames)), _tensor(proprio), _tensor(actions)


def _images(frames: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(frames).movedim(-1, -3).float() / 255


def _tensor(arrays: list[NDArray]) -> Tensor:
    return torch.from_numpy(np.stack(arrays))


def compare(drawn: Tensor, real: Tensor, lpips: LPIPS) -> dict[str, Tensor]:
    """Every metric of `(N, 3, H, W)` pictures against real ones, `(N,)` each, all finite."""
    return {
        "mse": mse(drawn, real),
        "psnr": psnr(drawn, real).clamp(max=MAX_PSNR),
        "ssim": ssim(drawn, real),
        "lpips": lpips(drawn, real),
    }


@torch.no_grad()
def evaluate(
    world: World[Any],
    datasets: Sequence[str | Path],
    *,
    windows: int = 200,
    horizon: int = 8,
    seed: int = 0,
    split: Split = "held_out",
    progress: bool = True,
) -> dict[str, Any]:
    """Scores a world on episodes of datasets.

    Args:
        world: A world of one of the two families.
        datasets: Folders of LeRobot v3 or RLDS datasets.
        windows: Windows per dataset.
        horizon: Control steps imagined open loop.
        seed: Seed of the choice of windows.
        split: Episodes that windows are chosen of.
        progress: Show a progress bar.

    Returns:
        Means over everything under `mse`, `psnr`, `ssim`, `lpips`, the same with `copy_` and
        `tokenizer_` in front, the error of the predicted position of the end effector in
        millimetres; `per_step` with lists of `horizon` of each, and `datasets` with the means of
        each dataset.
    """
    if not datasets or windows < 1:
        raise ValueError(
            f"{len(datasets)} datasets, windows={windows}: name a dataset and 1 or more windows"
        )
    lpips = LPIPS()
    everything: dict[str, list[Tensor]] = defaultdict(list)
    by_dataset: dict[str, Any] = {}
    for folder in datasets:
        dataset = open_dataset(folder)
        places = split_starts(dataset, horizon, windows, seed, split)
        scores: dict[str, list[Tensor]] = defaultdict(list)
        batches = [places[i : i + _BATCH] for i in range(0, len(places), _BATCH)]
        for batch in tqdm(batches, desc=dataset.name, disable=not progress):
            for name, values in _score(world, dataset, batch, horizon, lpips).items():
                scores[name].append(values)
        by_dataset[dataset.name] = {"windows": len(places), **_means(scores)}
        for name, parts in scores.items():
            everything[name] += parts
    per_step = {name: _rounded(torch.cat(v).mean(0).tolist()) for name, v in everything.items()}
    return {**_means(everything), "per_step": per_step, "datasets": by_dataset}


def _score(
    world: Any,
    dataset: Dataset,
    places: Sequence[tuple[int, int]],
    horizon: int,
    lpips: LPIPS,
) -> dict[str, Tensor]:
    """Every figure of a batch of windows, `(B, T)` each."""
    past = world.context
    frames, proprio, actions = read_windows(
        dataset, places, horizon, context=past, image_size=world.image_size
    )
    last, future = frames[:, past - 1], frames[:, past:]
    _, imagined = world.step(world.start(frames[:, :past], proprio[:, :past]), actions)
    redrawn = world.redraw(last, future, proprio[:, past - 1 :])
    pictures = {
        "": imagined.frames.flatten(0, 1).cpu(),
        "copy_": last.repeat_interleave(horizon, 0),
        "tokenizer_": redrawn.flatten(0, 1).cpu(),
    }
    scores = {
        prefix + name: values.view(-1, horizon)
        for prefix, drawn in pictures.items()
        for name, values in compare(drawn, future.flatten(0, 1), lpips).items()
    }
    off = imagined.proprio[..., :3].cpu() - proprio[:, past:, :3]
    return {**scores, "position_error_mm": off.norm(dim=-1) * 1000}


def _means(scores: dict[str, list[Tensor]]) -> dict[str, float]:
    return {name: round(float(torch.cat(parts).mean()), 5) for name, parts in scores.items()}


def _rounded(values: list[float]) -> list[float]:
    return [round(v, 5) for v in values]
