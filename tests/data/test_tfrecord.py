"""TFRecord files and tf.train.Example messages against a slow implementation, and damaged ones."""

from __future__ import annotations

import gzip
import io
import struct

import numpy as np
import pytest
import slow_tfrecord as slow

from wmgym.data import DatasetError, tf_example
from wmgym.data.crc32c import crc32c, masked_crc32c
from wmgym.data.tf_example import EncodingError
from wmgym.data.tfrecord import OVERHEAD, index_records, read_record, write_record

PUBLISHED = {
    b"123456789": 0xE3069283,
    bytes(32): 0x8A9136AA,
    b"\xff" * 32: 0x62A8AB43,
    bytes(range(32)): 0x46DD794E,
    b"": 0,
}


def test_checksums_are_the_published_ones():
    for data, expected in PUBLISHED.items():
        assert crc32c(data) == expected


@pytest.mark.parametrize("size", [1, 8191, 8192, 8193, 12_345, 65_536, 100_003])
def test_checksums_are_those_of_a_plain_loop(size):
    data = np.random.default_rng(size).bytes(size)
    assert crc32c(data) == slow.crc(data)
    assert struct.pack("<I", masked_crc32c(data)) == slow.masked(data)


# --- records ------------------------------------------------------------------------------------

DATA = [b"", b"one", bytes(range(256)) * 40, b"four"]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "x-train.tfrecord-00000-of-00001"
    path.write_bytes(b"".join(map(slow.record, DATA)))
    return path


def test_records_are_found_and_read(file):
    records = index_records(file)
    assert [read_record(record) for record in records] == DATA
    assert [record.number for record in records] == [0, 1, 2, 3]
    assert str(records[2]) == f"{file}, record 2"


def test_records_are_written_as_the_slow_writer_does(file):
    written = io.BytesIO()
    for data in DATA:
        write_record(written, data)
    assert written.getvalue() == file.read_bytes()
    assert len(written.getvalue()) == sum(map(len, DATA)) + OVERHEAD * len(DATA)


def test_a_file_cut_anywhere_is_refused_unless_it_is_cut_between_records(file):
    whole = file.read_bytes()
    ends = np.cumsum([0, *(len(data) + OVERHEAD for data in DATA)]).tolist()
    for length in [*range(60), *range(len(whole) - 40, len(whole))]:
        file.write_bytes(whole[:length])
        if length in ends:
            assert len(index_records(file)) == ends.index(length)
            continue
        with pytest.raises(DatasetError, match=r"record \d at byte \d+ is truncated") as error:
            index_records(file)
        assert str(file) in str(error.value)


def test_a_changed_byte_is_noticed_wherever_it_is(file):
    whole = bytearray(file.read_bytes())
    for place in range(0, len(whole), 41):
        whole[place] ^= 0x10
        file.write_bytes(whole)
        with pytest.raises(DatasetError, match=r"checksum|truncated"):
            [read_record(record) for record in index_records(file)]
        whole[place] ^= 0x10


def test_the_checksum_of_data_need_not_be_checked(file):
    whole = bytearray(file.read_bytes())
    whole[2 * OVERHEAD + 3 + 500] ^= 1
    file.write_bytes(whole)
    record = index_records(file)[2]
    with pytest.raises(DatasetError, match="record 2 is damaged"):
        read_record(record)
    assert len(read_record(record, verify=False)) == len(DATA[2])


def test_a_file_that_shrank_or_went_is_named(file):
    records = index_records(file)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DatasetError, match="record 2 is truncated"):
        read_record(records[2])
    file.unlink()
    with pytest.raises(DatasetError, match="record 2 cannot be read: No such file"):
        read_record(records[2])
    with pytest.raises(DatasetError, match="cannot be read: No such file"):
        index_records(file)


@pytest.mark.parametrize("content", [gzip.compress(b"data" * 100), b"PK\x03\x04" + bytes(60)])
def test_a_foreign_file_is_said_to_be_one(file, content):
    file.write_bytes(content)
    with pytest.raises(DatasetError, match="no TFRecord, or a damaged or compressed one"):
        index_records(file)


# --- messages -----------------------------------------------------------------------------------


def random_features(rng: np.random.Generator) -> dict[str, tuple[str, list]]:
    def values(kind: str) -> list:
        count = int(rng.choice([1, 2, 5, 40, 300]))
        if kind == "bytes":
            return [rng.bytes(int(n)) for n in rng.choice([0, 1, 127, 128, 300], count)]
        if kind == "floats":
            return rng.normal(0, 1e3, count).astype(np.float32).tolist()
        return [*rng.integers(-(2**63), 2**63 - 1, count).tolist(), 0, 1, -1, 127, 128]

    kinds = rng.choice(["bytes", "floats", "ints"], int(rng.integers(1, 9)))
    return {f"steps/{i}/{'x' * i * 30}": (str(k), values(str(k))) for i, k in enumerate(kinds)}


def decode(data, kinds):
    """Values of the features of a message, by the kind they are expected to have."""
    spans = tf_example.scan(io.BytesIO(data), 0, len(data))
    parts = {name: data[span.start : span.stop] for name, span in spans.items()}
    return {name: READERS[kinds.get(name, "ints")](part) for name, part in parts.items()}


READERS = {
    "bytes": lambda data: [data[start:stop] for start, stop in tf_example.items(data)],
    "floats": tf_example.floats,
    "ints": tf_example.ints,
}


def kinds_of(features):
    return {name: kind for name, (kind, _) in features.items()}


def assert_same(decoded, features):
    assert decoded.keys() == features.keys()
    for name, (kind, given) in features.items():
        if kind == "bytes":
            assert decoded[name] == given
        else:
            assert decoded[name].dtype == (np.float32 if kind == "floats" else np.int64)
            assert decoded[name].tolist() == given


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_messages_are_decoded(seed, packed):
    features = random_features(np.random.default_rng(seed))
    assert_same(decode(slow.example(features, packed=packed), kinds_of(features)), features)


@pytest.mark.parametrize("seed", range(20))
def test_messages_are_encoded(seed):
    features = random_features(np.random.default_rng(seed))
    dtypes = {"floats": np.float32, "ints": np.int64}
    arrays = {
        name: given if kind == "bytes" else np.array(given, dtypes[kind])
        for name, (kind, given) in features.items()
    }
    encoded = tf_example.encode(arrays)
    assert encoded == slow.example(dict(sorted(features.items())))
    assert slow.parse(encoded) == features


def test_booleans_and_float64_become_what_tensorflow_has():
    encoded = tf_example.encode({"a": np.array([True, False]), "b": np.array([0.1])})
    assert slow.parse(encoded) == {"a": ("ints", [1, 0]), "b": ("floats", [np.float32(0.1)])}


def test_what_protobuf_allows_is_understood():
    mixed = slow.sized(2, slow.sized(1, struct.pack("<2f", 1, 2)) + b"\x0d" + struct.pack("<f", 3))
    empty = slow.sized(1, b"late") + slow.sized(2, b"")
    backwards = slow.sized(2, slow.values("ints", [5])) + slow.sized(1, b"backwards")
    twice = slow.sized(1, b"twice") + slow.sized(
        2, slow.values("ints", [1]) + slow.values("bytes", [b"last"])
    )
    entries = [slow.sized(1, b"mixed") + slow.sized(2, mixed), empty, backwards, twice]
    unknown = b"\x38\x05" + b"\x41" + bytes(8) + slow.sized(9, b"later version")
    message = unknown + slow.sized(1, b"".join(slow.sized(1, e) + unknown for e in entries))
    decoded = decode(message, {"mixed": "floats", "backwards": "ints", "twice": "bytes"})
    assert decoded["mixed"].tolist() == [1, 2, 3]
    assert decoded["backwards"].tolist() == [5]
    assert decoded["twice"] == [b"last"]
    assert decoded.keys() == {"mixed", "backwards", "twice"}


def test_damaged_messages_raise_nothing_but_an_encoding_error():
    rng = np.random.default_rng(0)
    refused = 0
    for seed in range(30):
        features = random_features(np.random.default_rng(seed))
        data = bytearray(slow.example(features))
        for _ in range(20):
            broken = data.copy()
            for place in rng.integers(len(broken), size=3):
                broken[place] = rng.integers(256)
            try:
                decode(bytes(broken[: rng.integers(len(broken)) + 1]), kinds_of(features))
            except EncodingError:
                refused += 1
    assert refused > 100


def test_scanning_reads_few_bytes():
    class Counting(io.BytesIO):
        count = 0

        def read(self, size=-1):
            data = super().read(size)
            type(self).count += len(data)
            return data

    pictures = [bytes(10_000)] * 200
    data = slow.example({"a": ("bytes", pictures), "b": ("floats", [1.0] * 100)})
    spans = tf_example.scan(Counting(b"before" + data), 6, 6 + len(data))
    assert Counting.count < 300
    assert spans.keys() == {"a", "b"}
    part = (b"before" + data)[spans["b"].start : spans["b"].stop]
    assert tf_example.floats(part).tolist() == [1.0] * 100
