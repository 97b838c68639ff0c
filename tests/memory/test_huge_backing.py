"""Real memory of files of huge pages: whatever it is, it behaves as a memfd does; and which of them it is."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestmem.memory import PAGE_SIZE, MemfdBacking, PageIndex, Range, read_host
from guestmem.memory.backing import JUNK
from guestmem.memory.host_pages import host_pages, more_host_pages
from guestmem.memory.huge_backing import HugetlbBacking, ThpBacking, new_huge_backing
from guestmem.memory.pages import ORDER_1G, ORDER_2M, PageRange
from tests.host_pages import one_at_a_time

HUGE = 1 << ORDER_2M
SHMEM_POLICY = Path("/sys/kernel/mm/transparent_hugepage/hugepages-2048kB/shmem_enabled")
KINDS = ("memfd", "memfd+THP", "hugetlb 2M")


def pages(start: int, end: int) -> PageRange:
    return Range(PageIndex(start), PageIndex(end))


@pytest.fixture
def huge_pages() -> Iterator[int]:
    """How many huge pages of 2 MiB there are to be had."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(one_at_a_time())
            got = stack.enter_context(more_host_pages({ORDER_2M: 12}))[ORDER_2M]
        except OSError as error:
            pytest.skip(f"no huge pages of the host's: {error}")
        if got < 12:
            pytest.skip("the host has no memory for twelve huge pages")
        yield got


@pytest.fixture
def thp_policy() -> Iterator[None]:
    """Memfds get huge pages where they are asked for."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(one_at_a_time())
            before = SHMEM_POLICY.read_text().split("[")[1].split("]")[0]
            SHMEM_POLICY.write_text("advise")
        except OSError as error:
            pytest.skip(f"huge pages of memfds cannot be allowed: {error}")
        stack.callback(SHMEM_POLICY.write_text, before)
        yield


def new(kind: str, count: int, request: pytest.FixtureRequest, junk: bool = False) -> MemfdBacking:
    """A backing of that kind, of `count` huge pages, on a host that can have it."""
    if kind == "hugetlb 2M":
        request.getfixturevalue("huge_pages")
        backing = new_huge_backing(count * HUGE, "test", ORDER_2M, mappable=False, junk=junk)
    elif kind == "memfd+THP":
        request.getfixturevalue("thp_policy")
        backing = new_huge_backing(count * HUGE, "test", ORDER_2M, mappable=True, junk=junk)
    else:
        backing = MemfdBacking(count * HUGE, "test", junk)
    request.addfinalizer(backing.close)
    assert backing.kind == kind
    return backing


def write(backing: MemfdBacking, range_: PageRange, byte: int) -> None:
    ctypes.memset(backing.hva(range_.start), byte, range_.pages * PAGE_SIZE)


def holds(backing: MemfdBacking, range_: PageRange, byte: int) -> bool:
    return read_host(backing.hva(range_.start), range_.pages * PAGE_SIZE) == bytes([byte]) * range_.pages * PAGE_SIZE


def mapped_huge_kib() -> int:
    """Of hugetlb, in this process."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("HugetlbPages"))
    return int(line.split()[1])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_freed_and_used_again_reads_as_zero(kind: str, request: pytest.FixtureRequest) -> None:
    backing = new(kind, 3, request)
    backing.populate(pages(0, 3 * HUGE))
    backing.zero(pages(0, 3 * HUGE))
    write(backing, pages(0, 3 * HUGE), 7)
    backing.free(pages(HUGE, 2 * HUGE))
    assert holds(backing, pages(0, HUGE), 7) and holds(backing, pages(2 * HUGE, 3 * HUGE), 7)
    backing.zero(pages(HUGE, 2 * HUGE))
    assert holds(backing, pages(HUGE, 2 * HUGE), 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_is_cleared_and_its_neighbours_are_not(kind: str, request: pytest.FixtureRequest) -> None:
    backing = new(kind, 2, request)
    write(backing, pages(0, 2 * HUGE), 7)
    backing.clear(pages(5, HUGE + 1))
    assert holds(backing, pages(0, 5), 7)
    assert holds(backing, pages(5, HUGE + 1), 0)
    assert holds(backing, pages(HUGE + 1, 2 * HUGE), 7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_it_behaves_as_a_dict_of_pages(kind: str, seed: int, request: pytest.FixtureRequest) -> None:
    """The calls in the order in which the provider makes them: zeroed before it is used, freed as a whole."""
    choose = random.Random(seed)
    backing = new(kind, 4, request)
    used: dict[int, list[int]] = {}  # huge page -> the byte that each of its pages is full of
    for _ in range(60):
        huge = choose.randrange(4)
        whole = pages(huge * HUGE, (huge + 1) * HUGE)
        if huge not in used:
            if choose.random() < 0.5:
                backing.populate(whole)
            backing.zero(whole)
            used[huge] = [0] * HUGE
        elif choose.random() < 0.2:
            backing.free(whole)
            del used[huge]
            continue
        start = choose.randrange(HUGE)
        end = min(HUGE, start + choose.randrange(1, 40))
        part = pages(huge * HUGE + start, huge * HUGE + end)
        byte = choose.randrange(256)
        if choose.random() < 0.3:
            byte = 0
            backing.clear(part)
        else:
            write(backing, part, byte)
        used[huge][start:end] = [byte] * (end - start)
    for huge, expected in used.items():
        content = read_host(backing.hva(PageIndex(huge * HUGE)), HUGE * PAGE_SIZE)
        assert content == b"".join(bytes([byte]) * PAGE_SIZE for byte in expected)


@pytest.mark.parametrize("kind", KINDS)
def test_with_junk_a_stale_mapping_reads_junk(kind: str, request: pytest.FixtureRequest) -> None:
    backing = new(kind, 2, request, junk=True)
    write(backing, pages(0, HUGE), 7)
    backing.free(pages(0, HUGE))
    assert holds(backing, pages(0, HUGE), JUNK)
    backing.zero(pages(0, HUGE))
    assert holds(backing, pages(0, HUGE), 0)


@pytest.mark.parametrize("kind", ["memfd", "memfd+THP"])
def test_populating_makes_all_of_it(kind: str, request: pytest.FixtureRequest) -> None:
    backing = new(kind, 3, request)
    assert os.fstat(backing.fd).st_blocks == 0
    backing.populate(pages(HUGE, 3 * HUGE))
    assert os.fstat(backing.fd).st_blocks * 512 == 2 * HUGE * PAGE_SIZE


@pytest.mark.usefixtures("huge_pages")
def test_hugetlb_takes_what_it_populates() -> None:
    before = mapped_huge_kib()
    backing = HugetlbBacking(4 * HUGE, "test", ORDER_2M)
    assert mapped_huge_kib() == before
    backing.populate(pages(HUGE, 3 * HUGE))
    assert mapped_huge_kib() == before + 2 * 2048
    backing.close()
    assert mapped_huge_kib() == before


def test_what_is_closed_can_be_had_again(huge_pages: int) -> None:
    before = mapped_huge_kib()
    for _ in range(3):
        backing = HugetlbBacking((huge_pages - 2) * HUGE, "test", ORDER_2M)
        backing.populate(pages(0, 4 * HUGE))
        backing.free(pages(0, 2 * HUGE))
        backing.close()
        assert mapped_huge_kib() == before


def test_what_is_reserved_is_there_though_others_want_it_all(huge_pages: int, request: pytest.FixtureRequest) -> None:
    """Otherwise the touch would be SIGBUS. Freed pages are as good as those that were never used."""
    backing = new("hugetlb 2M", 4, request)
    backing.populate(pages(0, HUGE))
    backing.free(pages(0, HUGE))
    hogs: list[HugetlbBacking] = []
    with contextlib.suppress(OSError):
        while len(hogs) <= huge_pages:
            hogs.append(HugetlbBacking(HUGE, "hog", ORDER_2M))
            request.addfinalizer(hogs[-1].close)
            hogs[-1].populate(pages(0, HUGE))
    assert len(hogs) <= huge_pages - 4
    backing.zero(pages(0, 4 * HUGE))
    write(backing, pages(0, 4 * HUGE), 7)
    assert holds(backing, pages(0, 4 * HUGE), 7)


@pytest.mark.usefixtures("huge_pages")
def test_too_few_pages_mean_other_memory() -> None:
    now = host_pages(ORDER_2M)
    assert now is not None
    backing = new_huge_backing((now.available + 1) * HUGE, "test", ORDER_2M, mappable=False)
    assert not isinstance(backing, HugetlbBacking)
    backing.close()
    assert host_pages(ORDER_2M) == now


@pytest.mark.usefixtures("huge_pages")
def test_what_clients_map_is_never_hugetlb() -> None:
    backing = new_huge_backing(HUGE, "test", ORDER_2M, mappable=True)
    assert not isinstance(backing, HugetlbBacking)
    backing.close()


@pytest.mark.usefixtures("huge_pages")
def test_a_client_gets_a_memfd_of_the_size_that_shows_nothing(request: pytest.FixtureRequest) -> None:
    backing = new("hugetlb 2M", 2, request)
    write(backing, pages(0, HUGE), 7)
    memfd = MemfdBacking(HUGE, "test")
    request.addfinalizer(memfd.close)
    shown = os.fstat(backing.fd)
    assert (shown.st_dev, shown.st_size) == (os.fstat(memfd.fd).st_dev, 2 * HUGE * PAGE_SIZE)
    assert os.pread(backing.fd, PAGE_SIZE, 0) == bytes(PAGE_SIZE)


def test_pages_of_1_gib(request: pytest.FixtureRequest) -> None:
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(one_at_a_time())
            got = stack.enter_context(more_host_pages({ORDER_1G: 1}))[ORDER_1G]
        except OSError as error:
            pytest.skip(f"no huge pages of 1 GiB: {error}")
        if not got:
            pytest.skip("the host has no free GiB that is contiguous")
        backing = new_huge_backing(1 << ORDER_1G, "test", ORDER_1G, mappable=False)
        stack.callback(backing.close)
        assert backing.kind == "hugetlb 1G"
        small = new_huge_backing(HUGE, "test", ORDER_2M, mappable=False)
        stack.callback(small.close)
        assert small.kind != "hugetlb 1G"


@pytest.mark.usefixtures("thp_policy")
def test_thp_stays_huge_when_a_part_is_cleared(request: pytest.FixtureRequest) -> None:
    """A part that was punched would be missing, and the rest of the huge page broken up."""
    backing = new("memfd+THP", 2, request)
    backing.populate(pages(0, 2 * HUGE))
    backing.clear(pages(3, HUGE + 7))
    assert list(backing.existing(pages(0, 2 * HUGE))) == [pages(0, 2 * HUGE)]
    backing.free(pages(0, HUGE))
    assert list(backing.existing(pages(0, 2 * HUGE))) == [pages(HUGE, 2 * HUGE)]
    backing.clear(pages(0, HUGE))
    assert list(backing.existing(pages(0, 2 * HUGE))) == [pages(HUGE, 2 * HUGE)], "clearing brought memory into being"


@pytest.mark.usefixtures("thp_policy")
def test_whether_it_is_huge_is_the_hosts_to_say(request: pytest.FixtureRequest) -> None:
    backing = ThpBacking(2 * HUGE, "test")
    request.addfinalizer(backing.close)
    assert backing.is_huge()
    assert not list(backing.existing(pages(0, 2 * HUGE)))
    SHMEM_POLICY.write_text("never")
    assert not backing.is_huge()
    assert not list(backing.existing(pages(0, 2 * HUGE)))


def test_host_pages_are_given_back_whatever_happens() -> None:
    before = host_pages(ORDER_2M)
    if before is None or os.geteuid():
        pytest.skip("huge pages of the host's are for root")
    with one_at_a_time():
        before = host_pages(ORDER_2M)
        assert before is not None
        with contextlib.suppress(KeyboardInterrupt), more_host_pages({ORDER_2M: 3}) as got:
            now = host_pages(ORDER_2M)
            raise KeyboardInterrupt
        assert now is not None and now.total == before.total + got[ORDER_2M]
        assert host_pages(ORDER_2M) == before


_IN_A_CGROUP = """
import sys
from pathlib import Path
from guestmem.memory.huge_backing import new_huge_backing
from guestmem.memory.pages import ORDER_2M
Path(sys.argv[1], "cgroup.procs").write_text("0")
for count in (2, 3):
    backing = new_huge_backing(count << ORDER_2M, "test", ORDER_2M, mappable=False)
    status = Path("/proc/self/status").read_text()
    print(backing.kind, *[line.split()[1] for line in status.splitlines() if line.startswith("HugetlbPages")])
    backing.close()
"""


@pytest.mark.usefixtures("huge_pages")
def test_a_limit_of_usage_is_met_at_creation(cgroup: Path) -> None:
    """The controller charges a page when it is touched, and past the limit the touch would be SIGBUS."""
    (cgroup / "hugetlb.2MB.max").write_text(str(2 << 21))
    done = subprocess.run([sys.executable, "-c", _IN_A_CGROUP, cgroup], capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert first == "hugetlb 2M 4096"
    assert not second.startswith("hugetlb") and second.endswith(" 0")


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A cgroup of its own with the hugetlb controller."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    root = next((Path(place) for _, place, kind, *_ in mounts if kind == "cgroup2"), None)
    if root is None or "hugetlb" not in (root / "cgroup.controllers").read_text().split():
        pytest.skip("no cgroup v2 with the hugetlb controller")
    control = root / "cgroup.subtree_control"
    enabled = "hugetlb" in control.read_text().split()
    made = root / f"guestmem-test-{os.getpid()}"
    try:
        control.write_text("+hugetlb")
        made.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made: {error}")
    try:
        yield made
    finally:
        made.rmdir()
        if not enabled:
            control.write_text("-hugetlb")
