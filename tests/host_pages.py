"""The host's huge pages, which tests that run side by side share."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Nobody else changes the pools or the policies meanwhile. Raises: OSError where the kernel has none."""
    fd = os.open("/sys/kernel/mm/hugepages", os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
