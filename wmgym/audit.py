"""Does the imagined reward mean anything? The world against real physics, chunk by chunk.

A world is good enough to train in if it orders action chunks as reality does. From many held-out
starts the reference chunk `a*` is disturbed by noise of several sizes, and every chunk is run
twice: in the world, and in LIBERO from the same simulator state. Both give a distance to the
reference's own run (R3, and its counterpart on real frames); the audit reports how well the first
predicts the second, and what was really displaced.

Noise of size `s` on a chunk is `s (u + v_t) / sqrt(2)` with `u` drawn once and `v_t` at every step
from a unit normal: half of it is a steady push, which carries the arm away, half jitter.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from wmgym.data import open_dataset
from wmgym.envs.simulator import Simulator, gripper_command_after
from wmgym.extras import require
from wmgym.files import complete
from wmgym.rewards.perceptual import LPIPS
from wmgym.rewards.verified import RewardWeights, encode_reference, frame_distance
from wmgym.workers import in_workers
from wmgym.worlds.evaluate import read_windows, split_starts
from wmgym.worlds.metrics import psnr
from wmgym.worlds.world import World

NOISE_SIZES = (0.05, 0.1, 0.2, 0.4, 0.8)
"""Standard deviations of the noise, in units of the action space."""


@dataclass(frozen=True)
class AuditConfig:
    """What to audit.

    Attributes:
        data: Folders of LeRobot v3 datasets with held-out episodes and simulator states.
        world: Name or folder of the world.
        out: The report, with plots beside it as PNG; None: audit.json in the world's folder, or in
            the working directory for a world that ships.
        work: Real rollouts are kept there and not repeated.
        starts: Held-out starts per dataset; every start has a chunk per noise size.
        horizon: Control steps of a chunk.
        seed: Seed of starts and noise.
        workers: Simulator processes.
        fast_rendering: How the simulator renders: as the world's training data were.
    """

    data: tuple[Path, ...]
    world: str = "libero-small"
    out: Path | None = None
    work: Path = Path("runs/audit")
    starts: int = 300
    horizon: int = 8
    seed: int = 0
    workers: int = 2
    fast_rendering: bool = True

    def __post_init__(self) -> None:
        if not self.data or min(self.starts, self.horizon, self.workers) < 1:
            raise ValueError(
                f"{len(self.data)} datasets, starts={self.starts}, horizon={self.horizon}, "
                f"workers={self.workers}: name a dataset and 1 or more of each"
            )


@dataclass(frozen=True)
class Start:
    """One held-out start and its chunks.

    Attributes:
        dataset: Folder of the dataset.
        episode_id: Episode.
        frame: Step in the episode.
        actions: `(1 + S, T, 7)`: the reference chunk, then one per noise size.
    """

    dataset: Path
    episode_id: int
    frame: int
    actions: NDArray[np.float32]

    def file(self, config: AuditConfig) -> Path:
        """Where its real rollouts are kept: a name for each set of chunks and way to render."""
        key = self.actions.tobytes() + bytes([config.fast_rendering])
        digest = hashlib.sha256(key).hexdigest()[:12]
        name = f"{self.dataset.name}-{self.episode_id:05d}-{self.frame:04d}-{digest}.npz"
        return config.work / "real" / name


def disturbed(
    reference: NDArray[np.float32], rng: np.random.Generator, sizes: Sequence[float] = NOISE_SIZES
) -> NDArray[np.float32]:
    """The reference chunk `(T, 7)` and a noisy copy per size: `(1 + S, T, 7)` in [-1, 1]."""
    chunks = [reference]
    for size in sizes:
        push = rng.normal(size=(1, reference.shape[1]))
        jitter = rng.normal(size=reference.shape)
        chunks.append(np.clip(reference + size * (push + jitter) / np.sqrt(2), -1, 1))
    return np.stack(chunks).astype(np.float32)


def audit_starts(config: AuditConfig) -> list[Start]:
    """All starts of an audit with their chunks."""
    starts = []
    for index, folder in enumerate(config.data):
        dataset = open_dataset(folder)
        for episode_id, t in split_starts(dataset, config.horizon, config.starts, config.seed):
            rng = np.random.default_rng([config.seed, index, episode_id, t])
            reference = dataset.read(episode_id, t, t + config.horizon).actions
            starts.append(Start(Path(folder), episode_id, t, disturbed(reference, rng)))
    return starts


@functools.lru_cache(maxsize=1)
def _simulator(suite: str, task_id: int, size: tuple[int, int], fast: bool) -> Simulator:
    return Simulator(suite, task_id, image_size=size, fast_rendering=fast)


def _run_for_real(start: Start, config: AuditConfig) -> None:
    """Runs every chunk of a start in LIBERO and stores what the camera and the scene show."""
    target = start.file(config)
    if target.exists():
        return
    dataset = open_dataset(start.dataset)
    info = dataset.episodes[start.episode_id]
    piece = dataset.read(start.episode_id, start.frame, start.frame + 1)
    fingers = gripper_command_after(dataset.read_numbers(start.episode_id)[1][: start.frame])
    if piece.sim_states is None or "fixtures" not in info.extra:
        missing = "simulator states" if piece.sim_states is None else "poses of fixtures"
        raise ValueError(
            f"episode {start.episode_id} of {start.dataset} stores no {missing}, and an audit "
            f"needs them; `wmgym record` stores them, `wmgym subset --sim-states` keeps them"
        )
    height, width = piece.images.shape[1:3]
    simulator = _simulator(info.suite, info.task_id, (height, width), config.fast_rendering)
    frames, proprio, objects = [], [], []
    for chunk in start.actions:
        simulator.set_state(piece.sim_states[0], info.extra["fixtures"], fingers)
        for action in chunk:
            simulator.step(action)
            frames.append(simulator.render())
            proprio.append(simulator.proprio())
            objects.append(np.stack(list(simulator.object_positions().values())))
    chunks, steps, _ = start.actions.shape
    with complete(target) as part, part.open("wb") as file:
        np.savez_compressed(
            file,
            frames=np.stack(frames).reshape(chunks, steps, height, width, 3),
            proprio=np.stack(proprio).reshape(chunks, steps, -1),
            objects=np.stack(objects).reshape(chunks, steps, -1, 3),
        )


def run_for_real(starts: Sequence[Start], config: AuditConfig, *, progress: bool = True) -> None:
    """Runs all chunks in LIBERO, in parallel; starts that are done already are left alone."""
    (config.work / "real").mkdir(parents=True, exist_ok=True)
    ordered = sorted(starts, key=lambda s: (str(s.dataset), s.episode_id))
    run = functools.partial(_run_for_real, config=config)
    done = in_workers(run, ordered, config.workers)
    for _ in tqdm(done, total=len(ordered), desc="LIBERO", disable=not progress):
        pass


@torch.no_grad()
def audit(world: World, config: AuditConfig, *, progress: bool = True) -> dict[str, Any]:
    """Compares imagined with real distances.

    Args:
        world: The world to audit.
        config: What to audit.
        progress: Show progress bars.

    Returns:
        The figures of `summarise`, and under `chunks` the figures of every chunk.
    """
    starts = audit_starts(config)
    run_for_real(starts, config, progress=progress)
    lpips = LPIPS()
    rows: dict[str, list[Any]] = {}
    for number, start in enumerate(tqdm(starts, desc=world.name, disable=not progress)):
        for name, values in _compare(world, start, config, lpips).items():
            rows.setdefault(name, []).extend(values)
        rows.setdefault("start", []).extend([number] * len(NOISE_SIZES))
        rows.setdefault("noise", []).extend(NOISE_SIZES)
    table = {name: np.asarray(values) for name, values in rows.items()}
    chunks = {
        name: np.round(values, 6).tolist() for name, values in table.items() if values.ndim == 1
    }
    return {**summarise(table), "noise_sizes": list(NOISE_SIZES), "chunks": chunks}


def _compare(
    world: World, start: Start, config: AuditConfig, lpips: LPIPS
) -> dict[str, NDArray[np.float64]]:
    """Figures of the noisy chunks of one start, `(S,)` or `(S, T)` each."""
    with np.load(start.file(config), allow_pickle=False) as real:
        real_frames = torch.from_numpy(real["frames"]).movedim(-1, -3).float() / 255
        real_tip, objects = real["proprio"][..., :3], real["objects"]
    dataset = open_dataset(start.dataset)
    place, past, chunks = (start.episode_id, start.frame), world.context, len(start.actions)
    frames, proprio, _ = read_windows(
        dataset, [place], config.horizon, context=past, image_size=world.image_size
    )
    state = world.start(
        frames[:, :past].expand(chunks, -1, -1, -1, -1),
        proprio[:, :past].expand(chunks, -1, -1),
    )
    _, imagined = world.step(state, torch.from_numpy(start.actions))
    recorded = frames[:, past:].expand(chunks - 1, -1, -1, -1, -1)
    dreamed = imagined.frames.cpu()

    def distance(x: Tensor, y: Tensor) -> NDArray[np.float64]:
        reference = encode_reference(y, lpips)
        return (
            frame_distance(x, reference, lpips, RewardWeights())["total"].mean(1).double().numpy()
        )

    base = dreamed[:1].expand(chunks - 1, -1, -1, -1, -1)
    real_base = real_frames[:1].expand(chunks - 1, -1, -1, -1, -1)
    drift = psnr(dreamed[1:].flatten(0, 1), real_frames[1:].flatten(0, 1)).view(chunks - 1, -1)
    tip = np.linalg.norm(real_tip[1:] - real_tip[:1], axis=-1).mean(1)
    moved = np.linalg.norm(objects[1:] - objects[:1], axis=-1).max(-1)[:, -1]
    return {
        "imagined_r3": -distance(dreamed[1:], base),
        "imagined_r2": -distance(dreamed[1:], recorded),
        "real_r3": -distance(real_frames[1:], real_base),
        "tip_displacement_m": tip,
        "object_displacement_m": moved,
        "drift_psnr": drift.double().numpy(),
    }


def summarise(table: dict[str, NDArray]) -> dict[str, Any]:
    """Figures of an audit.

    Args:
        table: Per chunk: `imagined_r3`, `imagined_r2`, `real_r3`, `tip_displacement_m`,
            `object_displacement_m`, `start`, and `drift_psnr` `(n, T)`.

    Returns:
        `spearman_r3` and `spearman_r2` with the real R3 over all chunks, `spearman_r3_within` the
        mean over starts (what a group-normalised advantage sees), correlations of the imagined R3
        with what was displaced in metres, `pairs_wrong` the share of pairs of chunks of one start
        that the world orders the other way round, `drift_per_step` the PSNR of imagined against
        real frames of noisy chunks at each step.
    """
    imagined, real, start = table["imagined_r3"], table["real_r3"], table["start"]
    groups = [np.flatnonzero(start == s) for s in np.unique(start)]
    within = [spearman(imagined[g], real[g]) for g in groups]
    pairs = [(imagined[g][:, None] - imagined[g]) * (real[g][:, None] - real[g]) for g in groups]
    ordered = np.concatenate([p[np.triu_indices(len(p), 1)] for p in pairs])
    touched = table["object_displacement_m"] > 0.002
    return {
        "spearman_r3": round(spearman(imagined, real), 4),
        "spearman_r3_within": round(float(np.mean(within)), 4),
        "spearman_r2": round(spearman(table["imagined_r2"], real), 4),
        "spearman_tip": round(-spearman(imagined, table["tip_displacement_m"]), 4),
        "spearman_object": round(
            -spearman(imagined[touched], table["object_displacement_m"][touched]), 4
        ),
        "n_object_chunks": int(touched.sum()),
        "n_chunks": len(imagined),
        "n_starts": len(groups),
        "pairs_wrong": round(float((ordered < 0).mean()), 4),
        "drift_per_step": np.round(table["drift_psnr"].mean(0), 3).tolist(),
    }


def spearman(x: NDArray, y: NDArray) -> float:
    """Spearman's rank correlation; NaN for fewer than two values."""
    return float(require("scipy.stats", "libero").spearmanr(x, y).statistic)


def plot(report: dict[str, Any], path: str | Path) -> None:
    """Draws one page: imagined against real R3, R3 against displacement, drift, by noise size."""
    require("matplotlib", "libero")
    from matplotlib.figure import Figure

    chunks = {name: np.asarray(values) for name, values in report["chunks"].items()}
    figure = Figure(figsize=(12, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    colours = {"c": np.log2(chunks["noise"] / NOISE_SIZES[0]), "s": 8, "cmap": "viridis"}
    panels = (
        (axes[0, 0], "real_r3", "real R3", "spearman_r3"),
        (axes[0, 1], "tip_displacement_m", "gripper displaced (m, mean)", "spearman_tip"),
        (axes[1, 0], "object_displacement_m", "object displaced (m)", "spearman_object"),
    )
    for axis, key, label, figure_key in panels:
        points = axis.scatter(chunks[key], chunks["imagined_r3"], **colours)
        axis.set_xlabel(label)
        axis.locator_params(axis="x", nbins=5)
        axis.set_ylabel("imagined R3")
        axis.set_title(f"Spearman {abs(report[figure_key]):.3f}")
    bar = figure.colorbar(points, ax=axes[0, 1])
    bar.set_ticks(range(len(NOISE_SIZES)), labels=[str(s) for s in NOISE_SIZES])
    bar.set_label("noise on the chunk")
    steps = np.arange(1, len(report["drift_per_step"]) + 1)
    axes[1, 1].plot(steps, report["drift_per_step"], marker="o")
    axes[1, 1].set_xlabel("control step")
    axes[1, 1].set_ylabel("PSNR of imagined against real frames (dB)")
    axes[1, 1].set_title(
        f"{report['n_chunks']} chunks, {100 * report['pairs_wrong']:.1f} % of pairs ordered wrongly"
    )
    with complete(Path(path)) as part:
        figure.savefig(part, dpi=110, format="png")
