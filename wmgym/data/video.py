"""H.264 files as arrays: encode, decode a range of frames, join files without re-encoding.

Frames are `(N, H, W, 3)` uint8 RGB. Every written file is closed-GOP H.264 without B-frames and
with a keyframe every `GOP` frames, so that a range decodes after at most `GOP - 1` unwanted frames
and whole clips can be cut and joined by copying packets. A `Clip` is a run of frames inside a file;
frame `i` of a clip is shown at `start_s + i / fps`.

Opening a file costs about 1 ms, so files are opened for every read and no handle is shared between
threads or processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wmgym.data.episodes import DatasetError

CRF = 18
GOP = 10


@dataclass(frozen=True)
class Clip:
    """A run of frames in a video file.

    Attributes:
        path: The file.
        start_s: Presentation time of the first frame, seconds.
        length: Number of frames.
        fps: Frames per second.
    """

    path: Path
    start_s: float
    length: int
    fps: float


def encode(path: Path, frames: NDArray[np.uint8], fps: int) -> None:
    """Writes frames `(N, H, W, 3)` uint8 as an mp4; the same frames give the same bytes.

    Raises:
        ValueError: Wrong shape or dtype, no frames, or an odd height or width.
    """
    import av

    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise ValueError(
            f"frames are {frames.dtype} {frames.shape}, expected uint8 (N, H, W, 3) with N >= 1"
        )
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"frames are {height} x {width} pixels; H.264 needs even sizes")
    options = {"crf": str(CRF), "g": str(GOP), "bf": "0", "sc_threshold": "0", "threads": "1"}
    with av.open(str(path), "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for image in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@contextmanager
def _open(path: Path) -> Iterator[tuple[Any, Any]]:
    """An open container and its video stream; every failure inside becomes a `DatasetError`."""
    import av

    try:
        with av.open(str(path)) as container:
            streams = [s for s in container.streams.video if s.codec_context is not None]
            if not streams:
                raise DatasetError(f"{path} is damaged or truncated: no readable video stream")
            stream = streams[0]
            stream.codec_context.thread_count = 1
            yield container, stream
    except FileNotFoundError as error:
        raise DatasetError(f"{path} is missing") from error
    except av.FFmpegError as error:
        raise DatasetError(f"{path} is damaged or truncated: {error}") from error


def decode(clip: Clip, start: int, stop: int) -> NDArray[np.uint8]:
    """Frames `start ... stop` of a clip, `(stop - start, H, W, 3)`.

    Raises:
        DatasetError: The file is missing, damaged or lacks one of the frames.
    """
    frames: dict[int, NDArray[np.uint8]] = {}
    with _open(clip.path) as (container, stream):
        first = clip.start_s + (start - 0.5) / clip.fps
        seek_s = max(clip.start_s + start / clip.fps, 0.0)
        container.seek(round(seek_s / stream.time_base), stream=stream, backward=True)
        for frame in container.decode(stream):
            if frame.time is None or frame.time < first:
                continue
            index = round((frame.time - clip.start_s) * clip.fps)
            if index >= stop:
                break
            frames[index] = frame.to_ndarray(format="rgb24")
            if index == stop - 1:
                break
    missing = [i for i in range(start, stop) if i not in frames]
    if missing:
        raise DatasetError(
            f"{clip.path} is damaged or truncated: {len(missing)} of {stop - start} frames are "
            f"missing, the first at {clip.start_s + missing[0] / clip.fps:.3f} s"
        )
    return np.stack([frames[i] for i in range(start, stop)])


def keyframes(path: Path) -> Iterator[NDArray[np.uint8]]:
    """All keyframes `(H, W, 3)` of a file, a cheap sample of its frames."""
    with _open(path) as (container, stream):
        stream.codec_context.skip_frame = "NONKEY"
        for frame in container.decode(stream):
            yield frame.to_ndarray(format="rgb24")


@dataclass(frozen=True)
class Placement:
    """Where `ClipJoiner` put a clip.

    Attributes:
        file_index: Number of the output file, from 0.
        start_s: Time of the clip's first frame in it.
        stop_s: Time just after its last frame.
    """

    file_index: int
    start_s: float
    stop_s: float


class ClipJoiner:
    """Appends clips to numbered mp4 files by copying packets.

    A new file begins after `clips_per_file` clips, and where a clip was coded with other parameters
    (size, codec, headers), since one mp4 track cannot hold both. Use as a context manager.

    Args:
        path_of: File path by number.
        fps: Frames per second of all clips.
        clips_per_file: Most clips in one file, >= 1.
    """

    def __init__(self, path_of: Callable[[int], Path], fps: int, clips_per_file: int) -> None:
        self._path_of = path_of
        self._fps = fps
        self._clips_per_file = clips_per_file
        self._file_index = -1
        self._output: Any = None
        self._stream: Any = None
        self._parameters: tuple[object, ...] = ()
        self._clips = 0
        self._frames = 0

    def __enter__(self) -> ClipJoiner:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Finishes the current file."""
        if self._output is not None:
            self._output.close()
            self._output = None

    def add(self, clip: Clip) -> Placement:
        """Appends a clip.

        Raises:
            DatasetError: The file is damaged or truncated, or the clip starts between keyframes.
        """
        with _open(clip.path) as (container, source):
            context = source.codec_context
            parameters = (context.name, context.width, context.height, context.extradata)
            if (
                self._output is None
                or self._clips == self._clips_per_file
                or parameters != self._parameters
            ):
                self._begin_file(source, parameters)
            tick = 1 / (source.time_base * self._fps)
            first = round(clip.start_s / source.time_base)
            shift = round(self._frames * tick) - first
            end = first + clip.length * tick - tick / 2
            container.seek(first, stream=source, backward=True)
            copied = 0
            for packet in container.demux(source):
                if packet.pts is None or packet.pts < first - tick / 2:
                    continue
                if packet.dts is not None and packet.dts >= end:
                    break
                if packet.pts >= end:
                    continue
                if copied == 0 and not packet.is_keyframe:
                    raise DatasetError(
                        f"{clip.path}: no keyframe at {clip.start_s:.3f} s, where an episode "
                        "starts; re-encode the dataset with a keyframe at every episode start"
                    )
                packet.pts += shift
                packet.dts = packet.pts if packet.dts is None else packet.dts + shift
                packet.stream = self._stream
                self._output.mux(packet)
                copied += 1
        if copied != clip.length:
            raise DatasetError(
                f"{clip.path} is damaged or truncated: {copied} of {clip.length} frames from "
                f"{clip.start_s:.3f} s"
            )
        start = self._frames
        self._frames += clip.length
        self._clips += 1
        return Placement(self._file_index, start / self._fps, self._frames / self._fps)

    def _begin_file(self, source: Any, parameters: tuple[object, ...]) -> None:
        import av

        self.close()
        self._file_index += 1
        path = self._path_of(self._file_index)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._output = av.open(str(path), "w", format="mp4", options={"fflags": "+bitexact"})
        self._stream = self._output.add_stream_from_template(source, opaque=True)
        self._parameters = parameters
        self._clips = self._frames = 0
