"""The host's own huge pages: how many it has set aside, whether they are limited for us, and setting aside more.

Source: Documentation/admin-guide/mm/hugetlbpage.rst, Documentation/admin-guide/cgroup-v2.rst (hugetlb).
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from guestmem.memory.pages import ORDER_1G, PAGE_SHIFT

_POOLS = Path("/sys/kernel/mm/hugepages")
_CONTROLLER = "hugetlb"


class HostPages(NamedTuple):
    """Huge pages of one order: how many the host has, how many are free, and how many of these are promised already."""

    total: int
    free: int
    reserved: int

    @property
    def available(self) -> int:
        """How many a new reservation can have."""
        return self.free - self.reserved


def host_pages(order: int) -> HostPages | None:
    """None if the kernel has no huge pages of this order."""
    try:
        return HostPages(*(_read(order, name) for name in ("nr_hugepages", "free_hugepages", "resv_hugepages")))
    except OSError:
        return None


@contextlib.contextmanager
def more_host_pages(wanted: Mapping[int, int]) -> Iterator[dict[int, int]]:
    """Have the host set aside huge pages, `wanted` by order, and give them back at the end, however that comes.

    What it yields is how many it got: the host may have too few, or none that are contiguous. Needs root.

    Raises: OSError (EACCES), ENOENT where the kernel has no huge pages of this order.
    """
    got: dict[int, int] = {}
    try:
        for order, count in wanted.items():
            got[order] = _change(order, count)
        yield got
    finally:
        for order, count in got.items():
            _change(order, -count)


def usage_is_limited(order: int) -> bool:
    """Whether a cgroup limits how many huge pages this process may use, whatever is reserved."""
    name = f"{_CONTROLLER}.{'1GB' if order == ORDER_1G else '2MB'}"
    for directory in _own_cgroups():
        for limit in (directory / f"{name}.max", directory / f"{name}.limit_in_bytes"):
            with contextlib.suppress(OSError):
                text = limit.read_text().strip()
                if text != "max" and int(text) < 1 << 62:
                    return True
    return False


def _own_cgroups() -> Iterator[Path]:
    """The directories of this process' cgroups that hugetlb may be limited in, up to the root."""
    mounts: dict[str, str] = {}
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind, options, *_ = line.split()
        if kind == "cgroup2":
            mounts[""] = place
        elif kind == "cgroup" and _CONTROLLER in options.split(","):
            mounts[_CONTROLLER] = place
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            if controller in mounts:
                inner = Path(path.lstrip("/"))
                yield from (Path(mounts[controller]) / part for part in (inner, *inner.parents))


def _change(order: int, count: int) -> int:
    """Set so many more aside; how many the host did."""
    with (_pool(order) / "nr_hugepages").open("r+") as pool:
        fcntl.flock(pool, fcntl.LOCK_EX)  # others may do the same
        before = int(pool.read())
        pool.write(str(max(before + count, 0)))
        pool.flush()
        return _read(order, "nr_hugepages") - before


def _read(order: int, name: str) -> int:
    return int((_pool(order) / name).read_text())


def _pool(order: int) -> Path:
    return _POOLS / f"hugepages-{1 << (order + PAGE_SHIFT - 10)}kB"
