"""Tokens of windows, computed by a frozen tokenizer, once where a window always looks the same.

Without augmentation and with f0 as the context, the tokens of a window never change. They are then
kept in one memory-mapped file of a row a window: tokens plus 1 as uint16, so that a row is there
when it has no 0, whatever killed the process that wrote it. Every window is computed alone, so that
its tokens do not depend on its neighbours.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wmgym.worlds.tokens.action_tokens import ActionTokens
from wmgym.worlds.tokens.clips import Clips
from wmgym.worlds.tokens.compressive import CompressiveTokenizer


class WindowTokens:
    """Sequences of windows.

    Args:
        clips: The windows.
        tokenizer: The frozen tokenizer, on the clips' device.
        actions: How actions become tokens.
        folder: Where tokens are kept, or None; it must disappear with the clips it is about.
        bfloat16: Whether the tokenizer computes in bfloat16.

    Raises:
        OSError: The disk has no room for the tokens.
    """

    def __init__(
        self,
        clips: Clips,
        tokenizer: CompressiveTokenizer,
        actions: ActionTokens,
        folder: Path | None = None,
        *,
        bfloat16: bool = False,
    ) -> None:
        self.clips, self.tokenizer, self.actions = clips, tokenizer, actions
        self.vocabulary = tokenizer.vocabulary(actions.bins)
        self.bfloat16 = bfloat16
        frames = clips.sampler.horizon + 1
        shape = tokenizer.config
        self._split = (shape.context_tokens, frames * shape.dynamics_tokens)
        self._kept: np.memmap | None = None
        if folder is not None:
            path = folder / f"tokens-{digest(tokenizer, frames, bfloat16)}.u16"
            rows = (len(clips), sum(self._split))
            _reserve(path, 2 * rows[0] * rows[1])
            self._kept = np.memmap(path, np.uint16, "r+", shape=rows)

    def sequences(self, rows: Iterable[int], seeds: Sequence[int] | None = None) -> Tensor:
        """Sequences `(B, L)` of windows.

        Args:
            rows: The windows `(B,)`.
            seeds: One for every clip, as in `Clips.pictures`.
        """
        tokens = torch.stack(
            [self._tokens(row, None if seeds is None else seeds[i]) for i, row in enumerate(rows)]
        )
        context, frames = tokens.split(self._split, dim=1)
        frames = frames.unflatten(1, (-1, self.vocabulary.dynamics_tokens))
        bins = self.actions.encode(self.clips.actions(rows))
        return self.vocabulary.sequence(context, frames, bins)

    def _tokens(self, row: int, seed: int | None) -> Tensor:
        """Codes `(N + (T + 1) n,)` of a window, without offsets."""
        kept = self._kept if seed is None or not self.clips.varied else None
        if kept is not None and kept[row].all():
            return torch.from_numpy(kept[row].astype(np.int64) - 1).to(self.clips.device)
        clip = self.clips.pictures([row], None if seed is None else [seed])
        with (
            torch.no_grad(),
            torch.autocast(clip.device.type, torch.bfloat16, enabled=self.bfloat16),
        ):
            context, later = self.tokenizer.encode(clip)
        tokens = torch.cat([context.flatten(), later.flatten()])
        if kept is not None:
            kept[row] = tokens.cpu().numpy() + 1
        return tokens


def _reserve(path: Path, size: int) -> None:
    """Takes the room of a file: a full disk would kill who writes through a memory map.

    On macOS the file only gets its length.
    """
    path.touch()
    try:
        with path.open("r+b") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
    except OSError as error:
        path.unlink()
        reason = f"{error.strerror}; the tokens of all windows take {size} bytes"
        raise OSError(error.errno, reason, str(path)) from error


def digest(tokenizer: CompressiveTokenizer, *settings: object) -> str:
    """Hash of a tokenizer's weights and of settings."""
    found = hashlib.blake2b(repr(settings).encode(), digest_size=8)
    for name, tensor in sorted(tokenizer.state_dict().items()):
        found.update(f"{name} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
