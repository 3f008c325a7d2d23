"""Parquet files as arrays: rows of one episode out of files that hold many.

`StepTables` finds an episode's rows by its `episode_index` column, reads only the row groups they
lie in, and keeps the row groups used last, up to a number of bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wmgym.cache import ByteCache
from wmgym.data.episodes import DatasetError

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class _FileIndex:
    """Where the episodes of a file lie: row bounds of its row groups and of its episodes."""

    group_starts: NDArray[np.int64]
    episodes: dict[int, tuple[int, int]]


class StepTables:
    """Cached access to step files.

    Args:
        cache_bytes: Most memory for row groups; the last one used is kept in any case.
    """

    def __init__(self, cache_bytes: int) -> None:
        self._lock = threading.Lock()
        self._indices: dict[Path, _FileIndex] = {}
        self._groups = ByteCache(max(cache_bytes, 1))

    def __reduce__(self) -> tuple[type[StepTables], tuple[int]]:
        return StepTables, (self._groups.max_bytes,)

    def read(
        self, path: Path, episode_index: int, start: int, stop: int, columns: list[str]
    ) -> pa.Table:
        """Rows `start ... stop` of an episode.

        Raises:
            DatasetError: The file is missing or damaged, or lacks the rows or columns.
        """
        import pyarrow as pa

        with self._lock, parquet_errors(path):
            if path not in self._indices:
                self._indices[path] = _index(path)
            index = self._indices[path]
            if episode_index not in index.episodes:
                raise DatasetError(f"{path} holds no rows of episode {episode_index}")
            first, last = index.episodes[episode_index]
            if first + stop > last:
                raise DatasetError(
                    f"{path}: episode {episode_index} has {last - first} rows, but by the episode "
                    f"table at least {stop}"
                )
            first, last = first + start, first + stop
            starts = index.group_starts
            low = int(np.searchsorted(starts, first, "right")) - 1
            high = int(np.searchsorted(starts, last, "left"))
            groups = [self._group(path, g, tuple(columns)) for g in range(low, high)]
            return pa.concat_tables(groups).slice(first - int(starts[low]), last - first)

    def _group(self, path: Path, group: int, columns: tuple[str, ...]) -> pa.Table:
        import pyarrow.parquet as pq

        key = (path, group, columns)
        table = self._groups.get(key)
        if table is None:
            with pq.ParquetFile(path) as file:
                missing = [name for name in columns if name not in file.schema_arrow.names]
                if missing:
                    raise DatasetError(
                        f"{path} lacks the columns {', '.join(missing)}; "
                        f"present: {', '.join(file.schema_arrow.names)}"
                    )
                table = file.read_row_group(group, columns=list(columns), use_threads=False)
            table = table.select(columns)
            # One that is larger than the bound is kept, too: it takes the place of all others.
            self._groups.put(key, table, min(table.nbytes, self._groups.max_bytes))
        return table


def _index(path: Path) -> _FileIndex:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        sizes = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
        if "episode_index" not in file.schema_arrow.names:
            raise DatasetError(f"{path} lacks the column episode_index")
        episode = column_array(file.read(columns=["episode_index"], use_threads=False).column(0))
    edges = np.flatnonzero(np.diff(episode)) + 1
    bounds = zip([0, *edges], [*edges, len(episode)], strict=True)
    return _FileIndex(
        group_starts=np.cumsum([0, *sizes[:-1]]),
        episodes={int(episode[a]): (int(a), int(b)) for a, b in bounds if b > a},
    )


def read_rows(path: Path, *, skip_prefix: str) -> list[dict[str, Any]]:
    """All rows of a parquet file, without the columns that start with `skip_prefix`.

    Raises:
        DatasetError: The file is missing or damaged.
    """
    import pyarrow.parquet as pq

    with parquet_errors(path), pq.ParquetFile(path) as file:
        names = [n for n in file.schema_arrow.names if not n.startswith(skip_prefix)]
        return file.read(columns=names, use_threads=False).to_pylist()


@contextmanager
def parquet_errors(path: Path) -> Iterator[None]:
    """Turns what pyarrow raises for a missing or damaged file into a `DatasetError`."""
    import pyarrow as pa

    try:
        yield
    except FileNotFoundError as error:
        raise DatasetError(f"{path} is missing") from error
    except (OSError, pa.ArrowException) as error:
        raise DatasetError(f"{path} is damaged or truncated: {error}") from error


def list_column(values: NDArray) -> pa.Array:
    """`(N, D)` values as a parquet column of `N` lists of length `D`."""
    import pyarrow as pa

    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])


def column_array(column: pa.ChunkedArray) -> NDArray:
    """A column of numbers as `(N,)`, or of lists of one length as `(N, D)`."""
    import pyarrow as pa

    array = column.combine_chunks()
    kind = array.type
    if not (
        pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)
    ):
        return array.to_numpy(zero_copy_only=False)
    return array.flatten().to_numpy(zero_copy_only=False).reshape(len(array), -1)
