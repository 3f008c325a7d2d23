"""Reads RLDS datasets of LIBERO from TFRecord files, without TensorFlow.

`RLDSDataset` implements `wmgym.data.episodes.Dataset` for the modified LIBERO data
(`libero_{spatial,object,goal,10}_no_noops`) and anything of its specification
(`wmgym.data.rlds_format`). Opening walks the shards from length to length and reads the
instruction, the actions and the rewards of every episode, not its pictures. When steps of an
episode are read first, its checksum is checked and the places of its pictures are kept, 16 bytes
each; then only the pictures that are asked for are read and decoded. No file stays open.

Actions are LIBERO's own, the gripper -1 to open and +1 to close; pictures are stored turned by 180
degrees, as the contract of `wmgym.spaces` wants them. What OpenVLA and VLA-RFT train on, and what
the published `dataset_statistics.json` describe, has the gripper turned round: 1 opens, 0 closes.

Pictures are decoded with the accurate inverse transform of pillow. TensorFlow's default decoder is
a faster, coarser one: its pixels differ by about 1 level on average and by up to 15;
`tf.io.decode_jpeg(dct_method="INTEGER_ACCURATE")` gives the same as here.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from wmgym.data import rlds_format as fmt
from wmgym.data import tf_example
from wmgym.data.episodes import DatasetError, Episode, EpisodeInfo, check_steps
from wmgym.data.libero_tasks import task_numbers
from wmgym.data.tf_example import EncodingError, Span
from wmgym.data.tfrecord import Record, index_records, read_bytes, read_record
from wmgym.spaces import ACTION_DIM, PROPRIO_DIM

_BUFFER = 1024  # bytes read at a time while walking, less than a picture


@dataclass(frozen=True)
class _Header:
    """What opening reads of an episode."""

    record: Record
    spans: dict[str, Span]
    length: int
    instruction: str
    success: bool | None
    file_path: str


class RLDSDataset:
    """An RLDS dataset on disk.

    Args:
        root: The version folder with `dataset_info.json`, or its parent with exactly one of them.
        split: Which split is read.
        verify: Whether the checksum of an episode is checked when its steps are read first.

    Raises:
        DatasetError: A file is missing, truncated, damaged, or of another format or specification.
    """

    def __init__(self, root: str | Path, *, split: str = "train", verify: bool = True) -> None:
        self.root = fmt.version_folder(Path(root))
        document = _read_info(self.root)
        shards = _shards(self.root, document, split)
        self._split = split
        self._verify = verify
        self._name = self.root.resolve().parent.name
        suite = fmt.suite_of([self._name, str(document["name"])])
        self._headers = [header for path, count in shards for header in _headers(path, count)]
        numbers = task_numbers(suite, (header.instruction for header in self._headers))
        self._episodes = [_info(i, h, suite, numbers) for i, h in enumerate(self._headers)]
        self._pictures: dict[int, dict[str, NDArray[np.int64]]] = {}

    @property
    def name(self) -> str:
        """Name of the dataset's folder, without the version."""
        return self._name

    @property
    def has_wrist(self) -> bool:
        """Whether every episode has a wrist camera."""
        return all(fmt.WRIST_IMAGE in header.spans for header in self._headers)

    @property
    def episodes(self) -> list[EpisodeInfo]:
        """Descriptions of all episodes, by index."""
        return self._episodes

    def read(
        self, episode_id: int, start: int = 0, stop: int | None = None, *, wrist: bool = False
    ) -> Episode:
        """Steps `start ... stop` of one episode, with wrist images if asked for.

        Raises:
            IndexError: No such episode or steps.
            ValueError: Wrist images of a dataset without a wrist camera.
            DatasetError: The files are damaged.
        """
        start, stop = check_steps(self._episodes, episode_id, start, stop, self.root)
        if wrist and not self.has_wrist:
            raise ValueError(f"{self.root} has no wrist camera; read with wrist=False")
        images = self._images(episode_id, fmt.IMAGE, start, stop)
        wrist_images = self._images(episode_id, fmt.WRIST_IMAGE, start, stop) if wrist else None
        proprio, actions = self.read_numbers(episode_id)
        return Episode(
            info=self._episodes[episode_id],
            start=start,
            images=images,
            proprio=proprio[start:stop],
            actions=actions[start:stop],
            wrist_images=wrist_images,
        )

    def read_numbers(self, episode_id: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Proprioception `(N, 8)` and actions `(N, 7)` of an episode.

        Neither pictures nor checksum are read.

        Raises:
            IndexError: No such episode.
            DatasetError: The files are damaged.
        """
        check_steps(self._episodes, episode_id, 0, None, self.root)
        header = self._headers[episode_id]
        return (
            _vectors(header, fmt.STATE, PROPRIO_DIM),
            _vectors(header, fmt.ACTION, ACTION_DIM),
        )

    def fingerprint(self) -> str:
        """Hash of the place and the checksum of every episode; changes when the data change."""
        digest = hashlib.sha256(self._split.encode())
        for header in self._headers:
            record = header.record
            digest.update(f"{record.path.name} {record.start} {record.checksum}\n".encode())
        return digest.hexdigest()

    def _images(self, episode_id: int, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        """Decoded pictures `(n, H, W, 3)` of a camera."""
        record = self._headers[episode_id].record
        places = self._places(episode_id)[name][start:stop]
        first, last = int(places[0, 0]), int(places[-1, 1])
        data = read_bytes(record, first, last)
        with _explained(record):
            return np.stack([_decode(data[a:b]) for a, b in (places - first).tolist()])

    def _places(self, episode_id: int) -> dict[str, NDArray[np.int64]]:
        """Where the pictures `(N, 2)` of each camera lie in the file; the first time, checks it."""
        if episode_id not in self._pictures:
            header = self._headers[episode_id]
            data = read_record(header.record, verify=self._verify)
            self._pictures[episode_id] = {
                name: _picture_places(header, data, name)
                for name in (fmt.IMAGE, fmt.WRIST_IMAGE)
                if name in header.spans
            }
        return self._pictures[episode_id]


def _read_info(folder: Path) -> dict[str, Any]:
    path = folder / fmt.INFO_PATH
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        kind = document.get("fileFormat", "tfrecord")
        missing = [key for key in ("name", "splits") if key not in document]
    except (OSError, ValueError, AttributeError) as error:
        raise DatasetError(f"{path} is damaged: {error!r}") from error
    if missing:
        raise DatasetError(f"{path} is damaged: no entry {', '.join(missing)}")
    if kind != "tfrecord":
        raise DatasetError(
            f"{path}: fileFormat is {kind!r}, only 'tfrecord' is read; convert the dataset with "
            "TFDS's script convert_format"
        )
    return document


def _shards(folder: Path, document: dict[str, Any], split: str) -> list[tuple[Path, int]]:
    """Every shard of a split with the number of its records."""
    where = folder / fmt.INFO_PATH
    try:
        splits = {entry["name"]: entry for entry in document["splits"]}
        if split not in splits:
            raise DatasetError(f"{where}: split={split!r}, allowed are {', '.join(splits)}")
        entry = splits[split]
        lengths = [int(length) for length in entry["shardLengths"]]
        if not lengths:
            raise DatasetError(
                f"{where}: the split {split!r} has no shards; make or download it again"
            )
        template = entry.get("filepathTemplate", fmt.SHARD_TEMPLATE)
        names = [
            fmt.shard_name(template, document["name"], split, i, len(lengths))
            for i in range(len(lengths))
        ]
    except DatasetError:
        raise
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise DatasetError(f"{where} is damaged: {error!r}") from error
    return [(folder / name, length) for name, length in zip(names, lengths, strict=True)]


def _headers(path: Path, count: int) -> Iterator[_Header]:
    """What opening reads of the episodes of a shard."""
    records = index_records(path)
    if len(records) != count:
        raise DatasetError(
            f"{path} has {len(records)} records, {fmt.INFO_PATH} beside it says {count}; download "
            "or make the dataset again"
        )
    with path.open("rb", buffering=_BUFFER) as file:
        for record in records:
            with _explained(record):
                yield _header(record, file)


def _header(record: Record, file: BinaryIO) -> _Header:
    spans = tf_example.scan(file, record.start, record.stop)
    missing = [k for k in (fmt.ACTION, fmt.STATE, fmt.IMAGE, fmt.INSTRUCTION) if k not in spans]
    if missing:
        raise DatasetError(
            f"{record} has no {', '.join(missing)}, so it is not of the specification of the "
            f"modified LIBERO data; it has {', '.join(sorted(spans)) or 'nothing'}"
        )

    def read(name: str) -> bytes:
        span = spans.get(name, Span(0, 0))
        file.seek(span.start)
        return file.read(span.stop - span.start)

    def text(name: str) -> str:
        data = read(name)
        places = tf_example.items(data)
        return data[slice(*places[0])].decode() if places else ""

    actions = tf_example.floats(read(fmt.ACTION))
    if not len(actions) or len(actions) % ACTION_DIM:
        raise EncodingError(f"{fmt.ACTION} has {len(actions)} numbers, expected 7 for each step")
    return _Header(
        record=record,
        spans=spans,
        length=len(actions) // ACTION_DIM,
        instruction=text(fmt.INSTRUCTION),
        success=_success(
            tf_example.floats(read(fmt.REWARD)), tf_example.ints(read(fmt.IS_TERMINAL))
        ),
        file_path=text(fmt.FILE_PATH),
    )


def _success(reward: NDArray[np.float32], terminal: NDArray[np.int64]) -> bool | None:
    """Success if the last step is rewarded, failure if the episode was cut off, else unknown."""
    if len(reward) and reward[-1] > 0:
        return True
    return False if len(terminal) and not terminal[-1] else None


def _info(episode_id: int, header: _Header, suite: str, tasks: dict[str, int]) -> EpisodeInfo:
    origin = fmt.origin_of(header.file_path)
    if origin is None:
        origin = (suite, tasks[header.instruction], -1, -1)
    return EpisodeInfo(
        episode_id=episode_id,
        length=header.length,
        instruction=header.instruction,
        suite=origin[0],
        task_id=origin[1],
        init_state_id=origin[2],
        seed=origin[3],
        success=header.success,
        extra={"file_path": header.file_path} if header.file_path else {},
    )


def _vectors(header: _Header, name: str, size: int) -> NDArray[np.float32]:
    """Vectors `(N, size)` of an episode."""
    span = header.spans[name]
    with _explained(header.record):
        values = tf_example.floats(read_bytes(header.record, span.start, span.stop))
        if len(values) != header.length * size:
            raise EncodingError(
                f"{name} has {len(values)} numbers, expected {size} for each of {header.length} "
                "steps"
            )
    return values.reshape(header.length, size)


def _picture_places(header: _Header, data: bytes, name: str) -> NDArray[np.int64]:
    """Where the pictures `(N, 2)` of a camera lie in the file of a record with these data."""
    span, begin = header.spans[name], header.record.start
    with _explained(header.record):
        places = tf_example.items(data[span.start - begin : span.stop - begin])
        if len(places) != header.length:
            raise EncodingError(f"{name} has {len(places)} pictures in {header.length} steps")
    return np.array(places, np.int64) + span.start


def _decode(data: bytes) -> NDArray[np.uint8]:
    from PIL import Image

    try:
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    except OSError as error:
        raise EncodingError(f"a picture cannot be decoded: {error}") from error


@contextmanager
def _explained(record: Record) -> Iterator[None]:
    """Turns what damaged data raise into a `DatasetError` that names the record."""
    try:
        yield
    except DatasetError:
        raise
    except ValueError as error:
        raise DatasetError(
            f"{record} is damaged or of another specification: {error}; download or make the file "
            "again"
        ) from error
    except OSError as error:
        raise DatasetError(f"{record} cannot be read: {error.strerror or error}") from error
