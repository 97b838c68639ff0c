"""DaskPool: the workers of a Dask cluster that exists already. Needs the extra `cluster` (dask.distributed).

Every worker needs guestmem, and a scenario or mutant file of one's own at the same path. Dask does the work of a worker
that died again on another.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any


class DaskPool:
    """A client of the scheduler at `address`, for example tcp://10.0.0.1:8786."""

    def __init__(self, address: str) -> None:
        try:
            import distributed
        except ImportError as error:
            raise RuntimeError("--cluster needs dask.distributed: pip install 'guestmem[cluster]'") from error
        dask: Any = distributed  # untyped calls
        self._client: Any = dask.Client(address)
        self._completed: Any = dask.as_completed()
        self._numbers = itertools.count()
        self._futures: dict[str, int] = {}

    @property
    def workers(self) -> int:
        return max(1, sum(int(threads) for threads in self._client.nthreads().values()))

    def submit(self, function: Callable[..., Any], *arguments: Any) -> int:
        number = next(self._numbers)
        future = self._client.submit(function, *arguments, pure=False, retries=2)
        self._futures[future.key] = number
        self._completed.add(future)
        return number

    def next_done(self) -> tuple[int, Any]:
        future = next(self._completed)
        return self._futures.pop(future.key), future.result()

    def close(self) -> None:
        self._client.close()
