"""Where a long job says how far it is: a log of its figures, TensorBoard, and a progress bar."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from wmgym.distributed import Processes
from wmgym.extras import keep_tensorflow_out
from wmgym.files import json_lines, write_text

logger = logging.getLogger(__name__)


class Log:
    """Figures to `log.jsonl`, to TensorBoard where it is installed, and a progress bar on stderr.

    Args:
        folder: Folder of the run.
        step: Goes on after this step; what a killed run logged beyond it is dropped, at step 0
            everything.
        steps: Steps of the whole run.
        here: The processes of the run; only the main one writes.
        progress: Show a progress bar.

    Raises:
        ValueError: A line of an earlier log is damaged.
    """

    def __init__(
        self, folder: Path, step: int, steps: int, here: Processes, *, progress: bool
    ) -> None:
        self._bar = tqdm(total=steps, initial=step, disable=not (progress and here.main))
        self._file: TextIO | None = None
        self._board: Any = None
        if not here.main:
            return
        path = folder / "log.jsonl"
        kept = [entry for entry in json_lines(path) if entry.get("step", 0) <= step] if step else []
        write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))
        self._file = path.open("a")
        keep_tensorflow_out()
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder), purge_step=step + 1)
        except ImportError:
            logger.info("no TensorBoard log: pip install 'wmgym[train]'")

    def __enter__(self) -> Log:
        """Itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Closes the files and the bar."""
        self._bar.close()
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()

    def advance(self, **shown: float) -> None:
        """One step further on the progress bar, with some figures beside it."""
        self._bar.update()
        self._bar.set_postfix({name: f"{value:.4f}" for name, value in shown.items()})

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        if not self._bar.disable:
            self._bar.write(text)

    def write(self, step: int, group: str, figures: dict[str, float]) -> None:
        """Writes figures of a group, such as "train", at a step."""
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, "group": group, **figures}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in figures.items():
                self._board.add_scalar(f"{group}/{name}", value, step)
