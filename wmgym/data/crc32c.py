"""CRC-32C, the checksum of TFRecord files, in numpy.

A checksum is a linear function of the bits: the register after a text is the register after its
first part, moved on over as many zero bytes as its second part has, plus (exclusive or) the
register after the second part alone. So a text is cut into lanes of equal width, the lanes are read
side by side, two bytes of each at a time, and their registers are joined in pairs. On one core that
is a hundred megabytes a second and more; a table in a Python loop reads ten.

The register's initial value, all ones, is put into the first four bytes of the text, so that every
lane starts from zero and zeros in front change nothing.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from numpy.typing import NDArray

_POLYNOMIAL = np.uint32(0x82F63B78)  # Castagnoli's, bits reversed
_ONES = 0xFFFFFFFF
_SHORT = 8192
"""Bytes below which the loop is as fast."""


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli) of some bytes."""
    register = _loop(data) if len(data) < _SHORT else _lanes(data)
    return register ^ _ONES


def masked_crc32c(data: bytes) -> int:
    """The checksum as TFRecord files store it: rotated by 15 bits, plus a constant."""
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & _ONES


@cache
def _table(bits: int) -> NDArray[np.uint32]:
    """What becomes of the register's lowest `bits` bits when they are shifted out, `(2**bits,)`."""
    table = np.arange(2**bits, dtype=np.uint32)
    for _ in range(bits):
        table = (table >> 1) ^ np.where(table & 1, _POLYNOMIAL, np.uint32(0))
    return table


@cache
def _byte_table() -> list[int]:
    return _table(8).tolist()


def _loop(data: bytes) -> int:
    """The register after short data, byte by byte."""
    table, register = _byte_table(), _ONES
    for byte in data:
        register = table[(register ^ byte) & 0xFF] ^ (register >> 8)
    return register


def _lanes(data: bytes) -> int:
    """The register after long data, lanes of `2**power` bytes side by side."""
    power = math.ceil(math.log2(len(data)) / 2) - 1
    width = 2**power
    padded = np.zeros(-(-len(data) // width) * width, np.uint8)
    padded[-len(data) :] = np.frombuffer(data, np.uint8)
    first = len(padded) - len(data)
    padded[first : first + 4] ^= 0xFF
    columns = np.ascontiguousarray(padded.view("<u2").reshape(-1, width // 2).T)
    table = _table(16)
    registers = np.zeros(columns.shape[1], np.uint32)
    for column in columns:
        registers = table.take((registers ^ column) & 0xFFFF) ^ (registers >> 16)
    while len(registers) > 1:
        if len(registers) % 2:
            registers = np.concatenate([np.zeros(1, np.uint32), registers])
        registers = _apply(_shift(power), registers[0::2]) ^ registers[1::2]
        power += 1
    return int(registers[0])


@cache
def _shift(power: int) -> NDArray[np.uint32]:
    """The matrix, as 32 columns, that moves a register on over `2**power` zero bytes."""
    if power > 0:
        half = _shift(power - 1)
        return _apply(half, half)
    bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
    return _table(8)[bits & 0xFF] ^ (bits >> 8)


def _apply(matrix: NDArray[np.uint32], registers: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Multiplies registers `(n,)` by a matrix over the field of two elements."""
    result = np.zeros_like(registers)
    for bit in range(32):
        result ^= ((registers >> bit) & 1) * matrix[bit]
    return result
