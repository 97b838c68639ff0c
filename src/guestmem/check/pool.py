"""Pool: other processes that do pieces of work; on this machine, or wherever a Dask cluster has them.

What a pool promises: everything submitted comes back once, whichever worker died over it. Work is a function and
arguments that can be pickled, and doing it twice does no harm.
"""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol

Work = tuple[Callable[..., Any], tuple[Any, ...]]
MAX_LOSSES = 5


class Pool(Protocol):
    """`workers` pieces of work are done at a time."""

    @property
    def workers(self) -> int: ...

    def submit(self, function: Callable[..., Any], *arguments: Any) -> int:
        """A number for the piece of work."""
        ...

    def next_done(self) -> tuple[int, Any]:
        """Wait for a piece of work: its number and what it returned. Raises: what it raised."""
        ...

    def close(self) -> None: ...


class LocalPool:
    """Processes of this machine. One that is killed costs the work in flight, which is done again."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._numbers = itertools.count()
        self._work: dict[int, Work] = {}
        self._futures: dict[Future[Any], int] = {}
        self._losses = 0
        self._executor = self._new_executor()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> int:
        number = next(self._numbers)
        self._work[number] = (function, arguments)
        self._start(number)
        return number

    def next_done(self) -> tuple[int, Any]:
        while True:
            done, _ = wait(self._futures, return_when=FIRST_COMPLETED)
            future = done.pop()
            number = self._futures[future]
            try:
                result = future.result()
            except BrokenProcessPool:
                self._start_over()
                continue
            del self._futures[future], self._work[number]
            return number, result

    def processes(self) -> list[int]:
        """Process ids of the workers."""
        return list(self._executor._processes or ())

    def close(self) -> None:
        self._executor.shutdown(cancel_futures=True)

    def _new_executor(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(self.workers, mp_context=multiprocessing.get_context("spawn"))

    def _start(self, number: int) -> None:
        function, arguments = self._work[number]
        try:
            self._futures[self._executor.submit(function, *arguments)] = number
        except BrokenProcessPool:
            self._start_over()

    def _start_over(self) -> None:
        """A worker died, and with it the executor: a new one, and again whatever has not come back."""
        self._losses += 1
        if self._losses > MAX_LOSSES:
            raise RuntimeError(f"{self._losses} workers died; the machine may be out of memory")
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._executor = self._new_executor()
        self._futures.clear()
        for number in list(self._work):
            self._start(number)
