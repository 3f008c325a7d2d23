"""Worker processes of one thread each: simulation and software rendering gain from nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from typing import TypeVar

JobT = TypeVar("JobT")
ResultT = TypeVar("ResultT")


def in_workers(
    function: Callable[[JobT], ResultT], jobs: Iterable[JobT], workers: int
) -> Iterator[ResultT]:
    """Runs a function on every job in worker processes.

    An error in a job, Ctrl-C and the end of the iteration before the last result all drop the jobs
    that wait, kill those that run, and surface at once. What jobs write must bear that.

    Args:
        function: A function of a module, or a partial of one.
        jobs: Its arguments, started in this order.
        workers: Number of processes.

    Yields:
        Results, in the order in which jobs finish.
    """
    pool = ProcessPoolExecutor(workers, get_context("spawn"))
    try:
        with _environment(OMP_NUM_THREADS="1", LP_NUM_THREADS="0"):  # submitting starts processes
            pending = [pool.submit(function, job) for job in jobs]
        for future in as_completed(pending):
            yield future.result()
    except BaseException:
        for process in list(pool._processes.values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Sets variables of the environment, which libraries read when they are loaded."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
