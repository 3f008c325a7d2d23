"""Synthetic episodes whose frames carry their own number, readable after lossy coding."""

from __future__ import annotations

import numpy as np

from wmgym.data.episodes import Episode, EpisodeInfo

BITS = 16
LENGTHS = (23, 12, 31, 17)
WRIST_OFFSET = 0x4000


def coded_frames(numbers: np.ndarray) -> np.ndarray:
    """Images `(N, 64, 64, 3)`: a 4 x 4 board of black and white fields, one bit each."""
    bits = (numbers[:, None] >> np.arange(BITS)) & 1
    board = bits.reshape(-1, 4, 4).repeat(16, 1).repeat(16, 2)
    return np.where(board[..., None], np.uint8([250, 200, 230]), np.uint8([5, 30, 10]))


def decoded_numbers(images: np.ndarray) -> np.ndarray:
    """The numbers that `coded_frames` put in."""
    n, height, width, _ = images.shape
    fields = images.reshape(n, 4, height // 4, 4, width // 4, 3).mean((2, 4, 5)) > 127
    return (fields.reshape(n, BITS) << np.arange(BITS)).sum(1)


def make_episode(number: int, length: int, *, clean: bool = True) -> Episode:
    rng = np.random.default_rng([7, number])
    codes = 1000 * number + np.arange(length)
    info = EpisodeInfo(
        episode_id=0,
        length=length,
        instruction=f"pick up object {number % 2}",
        suite="libero_object",
        task_id=number % 2,
        init_state_id=38 + number,
        seed=100 + number,
        success=(True, False, None)[number % 3],
        extra={"noise": np.float32(0.25), "fixture": {"cabinet": np.arange(3.0)}},
    )
    return Episode(
        info=info,
        start=0,
        images=coded_frames(codes),
        proprio=rng.normal(size=(length, 8)).astype(np.float32),
        actions=rng.uniform(-1, 1, (length, 7)).astype(np.float32),
        wrist_images=coded_frames(codes + WRIST_OFFSET),
        clean_actions=rng.uniform(-1, 1, (length, 7)).astype(np.float32) if clean else None,
        sim_states=rng.normal(size=(length, 20 + number)),
    )
