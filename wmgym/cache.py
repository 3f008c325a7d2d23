"""A least-recently-used cache bounded by bytes.

The world and the recorded episodes never change, so what follows from a start state can be kept:
decoded frames, and the branch the world imagines under the recorded actions. Entries differ in size
by orders of magnitude (a start is about 0.5 MB, its perceptual features up to hundreds), so the
bound is on bytes and not on their number.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any


class ByteCache:
    """Maps keys to values and forgets the least recently used beyond `max_bytes`.

    Args:
        max_bytes: Bound on the sum of the sizes given to `put`; 0 keeps nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self._entries: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()

    def __len__(self) -> int:
        """Number of entries."""
        return len(self._entries)

    def get(self, key: Hashable) -> Any | None:
        """The value under `key`, now the most recently used, or None."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._entries.move_to_end(key)
        return entry[0]

    def put(self, key: Hashable, value: Any, size: int) -> None:
        """Stores `value` of `size` bytes; a value larger than the bound is not kept."""
        if size > self.max_bytes:
            return
        if key in self._entries:
            self.bytes -= self._entries.pop(key)[1]
        self._entries[key] = (value, size)
        self.bytes += size
        while self.bytes > self.max_bytes:
            self.bytes -= self._entries.popitem(last=False)[1][1]

    def clear(self) -> None:
        """Forgets everything."""
        self._entries.clear()
        self.bytes = 0
