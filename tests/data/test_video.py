from __future__ import annotations

import av
import numpy as np
import pytest
from coded_episodes import coded_frames, decoded_numbers

from wmgym.data import DatasetError
from wmgym.data.video import GOP, Clip, ClipJoiner, decode, encode, keyframes


def test_the_first_and_every_tenth_frame_is_a_keyframe(tmp_path):
    encode(tmp_path / "a.mp4", coded_frames(np.arange(25)), 20)
    read = decoded_numbers(np.stack(list(keyframes(tmp_path / "a.mp4"))))
    np.testing.assert_array_equal(read, [0, GOP, 2 * GOP])


@pytest.mark.parametrize("codec", ["libx264", "libsvtav1"])
def test_foreign_video_with_reordered_frames_is_read_and_joined(tmp_path, codec):
    """Public datasets are coded with B-frames or as AV1."""
    lengths, paths = [14, 9], []
    options = {"g": "2"} if codec == "libsvtav1" else {"bf": "2", "g": "7"}
    for i, length in enumerate(lengths):
        paths.append(tmp_path / f"{i}.mp4")
        with av.open(str(paths[-1]), "w") as container:
            stream = container.add_stream(codec, rate=10, options=options)
            stream.width = stream.height = 64
            stream.pix_fmt = "yuv420p"
            for image in coded_frames(100 * i + np.arange(length)):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())
    joined = tmp_path / "joined.mp4"
    with ClipJoiner(lambda index: joined, 10, 50) as joiner:
        places = [joiner.add(Clip(p, 0.0, n, 10)) for p, n in zip(paths, lengths, strict=True)]
    assert [p.file_index for p in places] == [0, 0]
    for i, (place, length) in enumerate(zip(places, lengths, strict=True)):
        clip = Clip(joined, place.start_s, length, 10)
        for start, stop in ((0, length), (3, 4), (length - 1, length), (2, 7)):
            np.testing.assert_array_equal(
                decoded_numbers(decode(clip, start, stop)), 100 * i + np.arange(start, stop)
            )
    again = tmp_path / "again.mp4"
    with ClipJoiner(lambda index: again, 10, 50) as joiner:
        place = joiner.add(Clip(joined, places[1].start_s, lengths[1], 10))
    np.testing.assert_array_equal(
        decoded_numbers(decode(Clip(again, place.start_s, lengths[1], 10), 0, lengths[1])),
        100 + np.arange(lengths[1]),
    )


def test_other_sizes_go_to_another_file(tmp_path):
    encode(tmp_path / "a.mp4", coded_frames(np.arange(5)), 20)
    encode(tmp_path / "b.mp4", coded_frames(np.arange(5))[:, ::2, ::2], 20)
    with ClipJoiner(lambda index: tmp_path / f"out-{index}.mp4", 20, 50) as joiner:
        places = [joiner.add(Clip(tmp_path / f"{n}.mp4", 0.0, 5, 20)) for n in "aabba"]
    assert [p.file_index for p in places] == [0, 0, 1, 1, 2]
    assert [p.start_s for p in places] == [0.0, 0.25, 0.0, 0.25, 0.0]


def test_a_clip_between_keyframes_cannot_be_cut(tmp_path):
    encode(tmp_path / "a.mp4", coded_frames(np.arange(25)), 20)
    with (
        ClipJoiner(lambda index: tmp_path / "out.mp4", 20, 50) as joiner,
        pytest.raises(DatasetError, match=r"a\.mp4: no keyframe at 0\.250 s"),
    ):
        joiner.add(Clip(tmp_path / "a.mp4", 0.25, 10, 20))


def test_many_clips_do_not_drift(tmp_path):
    """Times are sums of frames, not of rounded durations, at a rate no time base divides."""
    encode(tmp_path / "a.mp4", coded_frames(np.arange(7)), 30)
    with ClipJoiner(lambda index: tmp_path / "out.mp4", 30, 200) as joiner:
        places = [joiner.add(Clip(tmp_path / "a.mp4", 0.0, 7, 30)) for _ in range(150)]
    for place in places[::37]:
        clip = Clip(tmp_path / "out.mp4", place.start_s, 7, 30)
        np.testing.assert_array_equal(decoded_numbers(decode(clip, 0, 7)), np.arange(7))
