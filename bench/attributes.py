"""A file of 1 TiB: what creating it, 100,000 random conversions, and a million fragments take in memory.

Measured as resident memory of a fresh process, since the bitmaps live outside Python's own allocator. The peer is a
byte for each page.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time

from bench.harness import Row, report
from guestmem.host import Host
from guestmem.memory import Access, PageIndex, Range
from guestmem.uapi.kvm import VmType

SIZE = 1 << 40
PAGES = SIZE >> 12
GOAL_MIB = 64


def run() -> None:
    out = subprocess.run([sys.executable, "-m", "bench.attributes"], capture_output=True, text=True, check=True).stdout
    rows = []
    for line in out.splitlines():
        name, mib, seconds = line.split("\t")
        rows.append(Row(name, f"{float(mib):.1f} MiB resident, {float(seconds):.2f} s", f"{PAGES >> 20} MiB", None))
    report(f"state of 1 TiB (goal: under {GOAL_MIB} MiB)", "a byte a page", rows)


def resident_mib() -> float:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def child() -> None:
    """The steps, one after another; each prints what it has added so far, in MiB, and its time."""
    host = Host()
    vm = host.create_vm(VmType.SW_PROTECTED)
    rng = random.Random(1)
    random_pages = [rng.randrange(PAGES) for _ in range(100_000)]
    base = resident_mib()
    began = time.perf_counter()
    gmem = vm.create_guest_memfd(SIZE, mmap=True)
    _say("created", base, began)
    began = time.perf_counter()
    for page in random_pages:
        host.run(gmem.inode.convert(Range(PageIndex(page), PageIndex(page + 1)), Access.SHARED))
    _say("100,000 random 4K conversions", base, began)
    attributes = gmem.inode.attributes
    began = time.perf_counter()
    for page in range(0, PAGES, PAGES // 500_000):
        attributes.set(Range(PageIndex(page), PageIndex(page + 1)), Access.SHARED)
    _say("1,000,000 fragments, evenly spread", base, began)
    began = time.perf_counter()
    for page in range(0, PAGES, 2):
        attributes.set(Range(PageIndex(page), PageIndex(page + 1)), Access.SHARED)
        if page == 2_000_000:
            break
    _say("and a million more side by side", base, began)
    host.close()


def _say(name: str, base: float, began: float) -> None:
    print(name, resident_mib() - base, time.perf_counter() - began, sep="\t")


if __name__ == "__main__":
    child()
