"""Pictures to disk, one after the other: `VideoWriter` for mp4, `save_picture` for PNG.

A frame is encoded when it comes and then forgotten, so memory does not grow with the length of the
video beyond the encoder's own short window. Files appear under their name only when complete: until
then they are called `<name>.part`.

Frames are `(H, W, 3)` uint8 RGB. Videos are H.264 in yuv420p, which every player and browser takes;
it needs even sizes, so an odd last row or column is repeated.
"""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wmgym.data.video import CRF
from wmgym.files import complete


class VideoWriter:
    """Writes frames to an mp4 file as they come; a context manager.

    The file is in place after the `with` block; if the block raises, or the process dies, a file
    that was there before stays as it was.

    Args:
        path: The file; missing folders are made.
        fps: Frames per second, > 0.

    Attributes:
        path: The file.
        frames: Number of frames written.

    Raises:
        ValueError: The name does not end in ".mp4", or `fps` is not positive.

    Example:
        >>> with VideoWriter("rollout.mp4", fps=10) as video:  # doctest: +SKIP
        ...     for frame in frames:
        ...         video.write(frame)
    """

    def __init__(self, path: str | os.PathLike[str], fps: float = 20) -> None:
        self.path = Path(path)
        if self.path.suffix != ".mp4":
            raise ValueError(f"path={str(path)!r}: videos are written as .mp4")
        if not fps > 0:
            raise ValueError(f"fps={fps!r}: must be above 0")
        self.frames = 0
        self._rate = Fraction(fps).limit_denominator(1001)
        self._part = self.path.with_name(f"{self.path.name}.part")
        self._size: tuple[int, ...] = ()
        self._container: Any = None
        self._stream: Any = None

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def write(self, frame: NDArray[np.uint8]) -> None:
        """Appends a frame `(H, W, 3)` uint8.

        Raises:
            ValueError: Another shape or dtype, or another size than the first frame's.
        """
        import av

        if frame.ndim != 3 or frame.shape[-1] != 3 or frame.dtype != np.uint8 or not frame.size:
            raise ValueError(f"frame is {frame.dtype} {frame.shape}, expected uint8 (H, W, 3)")
        if self._container is None:
            self._open(frame.shape)
        if frame.shape != self._size:
            raise ValueError(f"frame is {frame.shape}, the first one was {self._size}")
        height, width = frame.shape[:2]
        even = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(even), format="rgb24")
        self._container.mux(self._stream.encode(picture))
        self.frames += 1

    def close(self) -> None:
        """Finishes the file and puts it in place; a second call does nothing.

        Raises:
            ValueError: No frame was written.
        """
        if self._container is None:
            if self.frames == 0:
                raise ValueError(f"{self.path}: no frame was written, so there is no video")
            return
        try:
            self._container.mux(self._stream.encode())
            self._shut()
            self._part.replace(self.path)
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Gives the video up and removes what was written of it."""
        try:
            if self._container is not None:
                self._shut()
        finally:
            if self._size:
                self._part.unlink(missing_ok=True)

    def _open(self, size: tuple[int, ...]) -> None:
        import av

        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Without the index in front, a browser must fetch the whole file before it can play it.
        container_options = {"fflags": "+bitexact", "movflags": "+faststart"}
        self._container = av.open(str(self._part), "w", format="mp4", options=container_options)
        options = {"crf": str(CRF), "preset": "veryfast", "bf": "0"}
        self._stream = self._container.add_stream("libx264", rate=self._rate, options=options)
        self._stream.height, self._stream.width = size[0] + size[0] % 2, size[1] + size[1] % 2
        self._stream.pix_fmt = "yuv420p"
        self._size = size

    def _shut(self) -> None:
        container, self._container, self._stream = self._container, None, None
        container.close()


def save_picture(path: str | os.PathLike[str], picture: NDArray[np.uint8]) -> Path:
    """Writes a picture `(H, W, 3)` uint8 as a PNG file; it appears only when complete.

    Returns:
        The file.

    Raises:
        ValueError: The name does not end in ".png".
    """
    target = Path(path)
    if target.suffix != ".png":
        raise ValueError(f"path={str(path)!r}: pictures are written as .png")
    target.parent.mkdir(parents=True, exist_ok=True)
    with complete(target) as part:
        Image.fromarray(picture).save(part, format="PNG")
    return target
