"""tf.train.Example messages in protobuf's encoding: named lists of bytes, floats or integers.

    Example { Features { map<string, Feature> } }
    Feature { one of BytesList = 1, FloatList = 2, Int64List = 3 }

A field is a tag, `number << 3 | wire type`, then a varint (type 0), 8 bytes (1), a length and so
many bytes (2), or 4 bytes (5). A list of numbers may be packed into one field or have a field for
each number, or both: a reader must take either. `scan` walks a message in an open file from length
to length and says where the values of every feature lie, without reading them, so that a few
numbers of a record that is mostly pictures cost a few short reads.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

Values = Sequence[bytes] | NDArray
"""Values of a feature: bytes, or numbers `(n,)`."""

_VARINT, _EIGHT, _SIZED, _FOUR = 0, 1, 2, 5
_LISTS = {1, 2, 3}
_LONGEST_HEAD = 20


class EncodingError(ValueError):
    """Bytes that are no message of this kind."""


@dataclass(frozen=True)
class Span:
    """Where the values of a feature lie in a file.

    Attributes:
        start: First byte of the list of values.
        stop: First byte after it.
    """

    start: int
    stop: int


def scan(file: BinaryIO, start: int, stop: int) -> dict[str, Span]:
    """Features of the message at bytes `start ... stop` of a file; those without values are absent.

    Raises:
        EncodingError: The bytes are no Example.
    """
    found: dict[str, Span] = {}
    for _, features in _messages(file, start, stop, {1}):
        for _, entry in _messages(file, *features, {1}):
            name, spans = "", []
            for number, place in _messages(file, *entry, {1, 2}):
                if number == 1:
                    name = _text(file, *place)
                else:
                    spans = list(_messages(file, *place, _LISTS))
            if spans:  # of several in a oneof, the last counts
                found[name] = Span(*spans[-1][1])
    return found


def items(data: bytes) -> list[tuple[int, int]]:
    """Where the values of a list of bytes lie in it, `(start, stop)` each.

    Raises:
        EncodingError: The bytes are no such list.
    """
    return [place for _, place in _messages(io.BytesIO(data), 0, len(data), {1})]


def floats(data: bytes) -> NDArray[np.float32]:
    """Values of a list of floats, `(n,)`.

    Raises:
        EncodingError: The bytes are no such list.
    """
    return np.frombuffer(b"".join(_numbers(data, _FOUR)), "<f4").astype(np.float32)


def ints(data: bytes) -> NDArray[np.int64]:
    """Values of a list of 64-bit integers, `(n,)`.

    Raises:
        EncodingError: The bytes are no such list.
    """
    values: list[int] = []
    for part in _numbers(data, _VARINT):
        place = 0
        while place < len(part):
            value, place = _varint(part, place)
            values.append(value - 2**64 if value >= 2**63 else value)
    return np.array(values, np.int64)


def encode(features: Mapping[str, Values]) -> bytes:
    """A message of features, in the order of their names, numbers packed.

    Args:
        features: Bytes, or arrays `(n,)` of floats (stored as float32), integers or booleans.
    """
    entries = [
        _sized(1, _sized(1, name.encode()) + _sized(2, _list(features[name])))
        for name in sorted(features)
    ]
    return _sized(1, b"".join(entries))


def _list(values: Values) -> bytes:
    """The field of a Feature that holds the values."""
    if not isinstance(values, np.ndarray):
        return _sized(1, b"".join(_sized(1, value) for value in values))
    if np.issubdtype(values.dtype, np.floating):
        return _sized(2, _sized(1, values.astype("<f4").tobytes()))
    packed = b"".join(_as_varint(value % 2**64) for value in values.astype(np.int64).tolist())
    return _sized(3, _sized(1, packed))


def _sized(number: int, data: bytes) -> bytes:
    return _as_varint(number << 3 | _SIZED) + _as_varint(len(data)) + data


def _as_varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """A varint and the place after it."""
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(data):
            break
        byte = data[place]
        value |= (byte & 0x7F) << shift
        place += 1
        if byte < 0x80:
            return value, place
    raise EncodingError("a number does not end")


def _fields(file: BinaryIO, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
    """Number, wire type and place of the content of every field of a message."""
    while start < stop:
        file.seek(start)
        head = file.read(min(_LONGEST_HEAD, stop - start))
        tag, used = _varint(head, 0)
        number, wire = tag >> 3, tag & 7
        if wire == _SIZED:
            size, used = _varint(head, used)
        elif wire == _VARINT:
            size = _varint(head, used)[1] - used
        elif wire in (_EIGHT, _FOUR):
            size = 8 if wire == _EIGHT else 4
        else:
            raise EncodingError(f"unknown wire type {wire} at byte {start}")
        begin, start = start + used, start + used + size
        if start > stop:
            raise EncodingError(f"a field ends at byte {start}, after the end of its message")
        yield number, wire, begin, start


def _messages(
    file: BinaryIO, start: int, stop: int, numbers: set[int]
) -> Iterator[tuple[int, tuple[int, int]]]:
    """Number and place of the sized fields of these numbers; others are skipped."""
    for number, wire, begin, end in _fields(file, start, stop):
        if number in numbers:
            if wire != _SIZED:
                raise EncodingError(f"field {number} at byte {begin} has wire type {wire}, not 2")
            yield number, (begin, end)


def _numbers(data: bytes, wire: int) -> Iterator[bytes]:
    """The encoded numbers of a list, packed or one to a field, in order."""
    for number, found, begin, end in _fields(io.BytesIO(data), 0, len(data)):
        if number == 1:
            if found not in (wire, _SIZED):
                raise EncodingError(f"a number at byte {begin} has wire type {found}, not {wire}")
            if wire == _FOUR and (end - begin) % 4:
                raise EncodingError(f"{end - begin} bytes at byte {begin} are no whole floats")
            yield data[begin:end]


def _text(file: BinaryIO, start: int, stop: int) -> str:
    file.seek(start)
    try:
        return file.read(stop - start).decode()
    except UnicodeDecodeError as error:
        raise EncodingError(f"a name at byte {start} is no UTF-8") from error
