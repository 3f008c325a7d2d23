"""Writing videos and pictures: sizes, streaming, atomicity, errors."""

from __future__ import annotations

import signal
import subprocess
import sys
import weakref

import av
import numpy as np
import pytest
from PIL import Image

from wmgym.recording import VideoWriter, save_picture


def moving_bar(count, height=32, width=48):
    for i in range(count):
        frame = np.full((height, width, 3), 40, np.uint8)
        frame[:, 2 * i % width : 2 * i % width + 8] = (230, 60, 20)
        yield frame


def write(path, frames, **kwargs):
    with VideoWriter(path, **kwargs) as video:
        for frame in frames:
            video.write(frame)
    return video.frames


def decode(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [f.to_ndarray(format="rgb24") for f in container.decode(stream)]
        return np.stack(frames), float(stream.average_rate)


@pytest.mark.parametrize("size", [(32, 48), (33, 48), (32, 47), (31, 45)])
def test_frames_come_back(tmp_path, size):
    path = tmp_path / "new folder" / "bar.mp4"
    assert write(path, moving_bar(9, *size), fps=12.5) == 9
    frames, fps = decode(path)
    height, width = size
    assert frames.shape == (9, height + height % 2, width + width % 2, 3)
    assert fps == pytest.approx(12.5)
    for seen, frame in zip(frames, moving_bar(9, *size), strict=True):
        # Chroma has half the resolution, so colours bleed at the bar's edges and only there.
        gap = np.abs(seen[:height, :width].astype(int) - frame)
        assert np.median(gap) <= 6
        assert gap.mean() < 12
    assert [p.name for p in path.parent.iterdir()] == ["bar.mp4"]


def test_frames_are_not_kept(tmp_path):
    given, most = [], 0
    with VideoWriter(tmp_path / "long.mp4") as video:
        for frame in moving_bar(60):
            video.write(frame)
            given.append(weakref.ref(frame))
            most = max(most, sum(g() is not None for g in given))
        size = (tmp_path / "long.mp4.part").stat().st_size
    assert video.frames == 60
    assert most <= 2
    assert size > 0


def test_an_exception_leaves_the_old_file(tmp_path):
    path = tmp_path / "bar.mp4"
    path.write_bytes(b"old")

    def fail():
        yield from moving_bar(5)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write(path, fail())
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_kill_leaves_no_final_file(tmp_path):
    path = tmp_path / "bar.mp4"
    code = (
        "import os, signal, numpy as np\n"
        "from wmgym.recording import VideoWriter\n"
        f"with VideoWriter({str(path)!r}) as video:\n"
        "    for i in range(20):\n"
        "        video.write(np.full((32, 48, 3), 10 * i, np.uint8))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    process = subprocess.run([sys.executable, "-c", code], check=False)
    assert process.returncode == -signal.SIGKILL
    assert not path.exists()
    write(path, moving_bar(3))
    assert len(decode(path)[0]) == 3
    assert list(tmp_path.iterdir()) == [path]


def test_refuses_what_is_no_video(tmp_path):
    with pytest.raises(ValueError, match=r"\.mp4"):
        VideoWriter(tmp_path / "bar.avi")
    with pytest.raises(ValueError, match="fps"):
        VideoWriter(tmp_path / "bar.mp4", fps=0)
    with pytest.raises(ValueError, match="no frame"):
        write(tmp_path / "bar.mp4", [])
    for wrong in (
        np.zeros((8, 8), np.uint8),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((8, 8, 3), np.float32),
        np.zeros((0, 8, 3), np.uint8),
    ):
        with pytest.raises(ValueError, match="expected uint8"):
            write(tmp_path / "b.mp4", [wrong])
    with pytest.raises(ValueError, match="first one"):
        write(tmp_path / "b.mp4", [*moving_bar(2), *moving_bar(1, width=50)])
    assert list(tmp_path.iterdir()) == []


def test_pictures(tmp_path):
    frame = next(moving_bar(1))
    path = save_picture(tmp_path / "deep" / "bar.png", frame)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), frame)
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(ValueError, match=r"\.png"):
        save_picture(tmp_path / "bar.jpg", frame)
    with pytest.raises(TypeError):
        save_picture(path, frame.astype(np.float64))
    np.testing.assert_array_equal(np.asarray(Image.open(path)), frame)
    assert list(path.parent.iterdir()) == [path]


def test_writing_needs_no_torch():
    code = "import sys, wmgym.recording.video, wmgym.recording.strip; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
