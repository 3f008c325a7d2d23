"""TFRecord files: a row of records, each `length u64, checksum u32, data, checksum u32`.

Numbers are little-endian; checksums are masked CRC-32C, the first of the length, the second of the
data. `index_records` walks a file from length to length without reading data; the lengths'
checksums tell a damaged or foreign file at once. `read_record` reads one record and, unless told
not to, checks its data.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from wmgym.data.crc32c import masked_crc32c
from wmgym.data.episodes import DatasetError

_HEAD = 12
_TAIL = 4
OVERHEAD = _HEAD + _TAIL
"""Bytes of a record besides its data."""


@dataclass(frozen=True)
class Record:
    """Where a record lies.

    Attributes:
        path: The file.
        number: Its index in the file.
        start: First byte of its data.
        stop: First byte after its data.
        checksum: Masked checksum of its data.
    """

    path: Path
    number: int
    start: int
    stop: int
    checksum: int

    def __str__(self) -> str:
        return f"{self.path}, record {self.number}"


def index_records(path: Path) -> list[Record]:
    """All records of a file, found without reading their data.

    Raises:
        DatasetError: The file is missing, truncated, damaged or no TFRecord file.
    """
    records: list[Record] = []
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            start = 0
            while start < size:
                file.seek(start)
                length = _length(f"{path}, record {len(records)}", start, file.read(_HEAD), size)
                begin, end = start + _HEAD, start + _HEAD + length
                file.seek(end)
                (checksum,) = struct.unpack("<I", file.read(_TAIL))
                records.append(Record(path, len(records), begin, end, checksum))
                start = end + _TAIL
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror or error}") from error
    return records


def read_record(record: Record, *, verify: bool = True) -> bytes:
    """The data of a record.

    Args:
        record: As `index_records` found it.
        verify: Whether the checksum of the data is checked.

    Raises:
        DatasetError: The file is missing, became shorter, or the data are damaged.
    """
    data = read_bytes(record, record.start, record.stop)
    if verify and masked_crc32c(data) != record.checksum:
        raise DatasetError(f"{record} is damaged: its data do not fit their checksum; {_RENEW}")
    return data


def read_bytes(record: Record, start: int, stop: int) -> bytes:
    """Bytes `start ... stop` of a record's file, unchecked.

    Raises:
        DatasetError: The file is missing or became shorter.
    """
    try:
        with record.path.open("rb", buffering=0) as file:
            file.seek(start)
            data = file.read(stop - start)
    except OSError as error:
        raise DatasetError(f"{record} cannot be read: {error.strerror or error}") from error
    if len(data) < stop - start:
        raise DatasetError(f"{record} is truncated; {_RENEW}")
    return data


def write_record(file: BinaryIO, data: bytes) -> None:
    """Appends a record to a file open for writing."""
    length = struct.pack("<Q", len(data))
    file.write(length + struct.pack("<I", masked_crc32c(length)))
    file.write(data)
    file.write(struct.pack("<I", masked_crc32c(data)))


_RENEW = "download or make the file again"


def _length(where: str, start: int, head: bytes, size: int) -> int:
    """Bytes of data of the record at byte `start` of a file of `size` bytes, begun by `head`."""
    if len(head) == _HEAD:
        length, checksum = struct.unpack("<QI", head)
        if masked_crc32c(head[:8]) != checksum:
            kind = "is damaged" if start else "is no TFRecord, or a damaged or compressed one"
            raise DatasetError(f"{where} {kind}: its length does not fit its checksum; {_RENEW}")
        if start + _HEAD + length + _TAIL <= size:
            return length
    raise DatasetError(f"{where} at byte {start} is truncated: the file has {size} bytes; {_RENEW}")
