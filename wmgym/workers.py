"""Worker processes of one thread each: simulation and software rendering gain from nothing else.

Jobs of one group, such as the episodes of a task, share something that takes long to make and that
a worker keeps. A worker therefore stays with its group, goes on with one that nobody works at, and
helps with the largest where all are taken.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from typing import TypeVar

JobT = TypeVar("JobT")
ResultT = TypeVar("ResultT")


def in_workers(
    function: Callable[[JobT], ResultT],
    jobs: Iterable[JobT],
    workers: int,
    group: Callable[[JobT], Hashable] | None = None,
) -> Iterator[ResultT]:
    """Runs a function on every job in worker processes, which end when this one does.

    An error in a job, Ctrl-C and the end of the iteration before the last result all drop the jobs
    that wait, kill those that run, and surface at once. What jobs write must bear that.

    Args:
        function: A function of a module, or a partial of one.
        jobs: Its arguments; those of a group are started in this order.
        workers: Largest number of processes.
        group: Group of a job; without, all are of one.

    Yields:
        Results, in the order in which jobs finish.
    """
    waiting: dict[Hashable, deque[JobT]] = {}
    for job in jobs:
        waiting.setdefault(None if group is None else group(job), deque()).append(job)
    running: dict[Future[ResultT], tuple[ProcessPoolExecutor, Hashable]] = {}

    def begin(pool: ProcessPoolExecutor, last: Hashable = None) -> None:
        if not waiting:
            return
        taken = {key for _, key in running.values()}
        free = {key: len(left) if key in taken else math.inf for key, left in waiting.items()}
        key = last if last in waiting else max(free, key=free.__getitem__)
        running[pool.submit(function, waiting[key].popleft())] = pool, key
        if not waiting[key]:
            del waiting[key]

    # One pool each, since a pool of several does not let its workers choose.
    context, count = get_context("spawn"), min(workers, sum(map(len, waiting.values())))
    pools = [ProcessPoolExecutor(1, context, initializer=_settle_in) for _ in range(count)]
    try:
        with _environment(OMP_NUM_THREADS="1", LP_NUM_THREADS="0"):  # submitting starts processes
            for pool in pools:
                begin(pool)
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                pool, key = running.pop(future)
                result = future.result()
                begin(pool, key)
                yield result
    except BaseException:
        for process in [p for pool in pools for p in (pool._processes or {}).values()]:
            process.terminate()
        raise
    finally:
        for pool in pools:
            pool.shutdown(cancel_futures=True)


def _settle_in() -> None:
    """Prepares a worker: it dies with its parent, and leaves the terminal to progress bars."""
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


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
