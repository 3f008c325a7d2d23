"""TFRecord and tf.train.Example once more: slow, short, and not the package's own."""

from __future__ import annotations

import struct

CODES = {"bytes": 1, "floats": 2, "ints": 3}


def shifted(register: int) -> int:
    """CRC-32C's register eight bits on."""
    for _ in range(8):
        register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    return register


BYTES = [shifted(byte) for byte in range(256)]


def crc(data: bytes) -> int:
    """CRC-32C, byte by byte."""
    register = 0xFFFFFFFF
    for byte in data:
        register = BYTES[register & 0xFF ^ byte] ^ register >> 8
    return register ^ 0xFFFFFFFF


def masked(data: bytes) -> bytes:
    value = crc(data)
    return struct.pack("<I", ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + masked(length) + data + masked(data)


def varint(value: int) -> bytes:
    value %= 2**64
    groups = [value >> shift & 0x7F for shift in range(0, 64, 7)]
    while len(groups) > 1 and groups[-1] == 0:
        groups.pop()
    return bytes([*(group | 0x80 for group in groups[:-1]), groups[-1]])


def sized(number: int, data: bytes) -> bytes:
    return varint(number * 8 + 2) + varint(len(data)) + data


def values(kind: str, given: list, *, packed: bool = True) -> bytes:
    """The field of a Feature with the values of a list."""
    if kind == "bytes":
        return sized(1, b"".join(sized(1, value) for value in given))
    if kind == "floats":
        plain = [struct.pack("<f", value) for value in given]
        single = [varint(8 + 5) + value for value in plain]
    else:
        plain = [varint(value) for value in given]
        single = [varint(8) + value for value in plain]
    return sized(CODES[kind], sized(1, b"".join(plain)) if packed else b"".join(single))


def example(features: dict[str, tuple[str, list]], *, packed: bool = True) -> bytes:
    """An Example of features `{name: (kind, values)}`, in the order given."""
    entries = [
        sized(1, sized(1, name.encode()) + sized(2, values(kind, given, packed=packed)))
        for name, (kind, given) in features.items()
    ]
    return sized(1, b"".join(entries))


def take_varint(data: bytes) -> tuple[int, bytes]:
    count = next(i for i, byte in enumerate(data) if byte < 0x80) + 1
    return sum((byte & 0x7F) << 7 * i for i, byte in enumerate(data[:count])), data[count:]


def fields(data: bytes) -> list[tuple[int, int, bytes]]:
    found = []
    while data:
        tag, data = take_varint(data)
        if tag % 8 == 0:
            value, rest = take_varint(data)
            content, data = varint(value), rest
        else:
            size, data = take_varint(data) if tag % 8 == 2 else ({5: 4, 1: 8}[tag % 8], data)
            content, data = data[:size], data[size:]
        found.append((tag // 8, tag % 8, content))
    return found


def parse(data: bytes) -> dict[str, tuple[str, list]]:
    """The features of an Example, `{name: (kind, values)}`."""
    kinds = {code: kind for kind, code in CODES.items()}
    found = {}
    for _, _, entry in fields(fields(data)[0][2]):
        name, feature = (content for _, _, content in fields(entry))
        for code, _, content in fields(feature):
            kind, given = kinds[code], []
            for _, wire, part in fields(content):
                if kind == "bytes":
                    given.append(part)
                elif kind == "floats":
                    given += struct.unpack(f"<{len(part) // 4}f", part)
                else:
                    assert wire in (0, 2)
                    while part:
                        value, part = take_varint(part)
                        given.append(value - 2**64 if value >= 2**63 else value)
            found[name.decode()] = kind, given
    return found
