"""The made-up traces: each does what it says, and nothing that a guest could not do."""

from __future__ import annotations

import itertools

import pytest
from pyroaring import BitMap64

from guestmem.memory.pages import PAGE_SHIFT
from guestmem.simulate.generators import GENERATORS, MIN_MEMORY, Generated, boot, swiotlb
from guestmem.simulate.machine import MAX_BYTES
from guestmem.simulate.source import Source
from guestmem.trace import Refusal
from guestmem.trace import events as event
from tests.simulate.conftest import G1, M2

MEMORIES = {"1 GiB": 1 << 30, "3 GiB and a bit": (3 << 30) + (2 << 20), "16 GiB": 16 << 30, "1 TiB": 1 << 40}
CASES = [pytest.param(kind, size, id=f"{kind}, {name}") for kind in GENERATORS for name, size in MEMORIES.items()]


@pytest.mark.parametrize(("kind", "memory"), CASES)
def test_a_guest_could_do_all_of_it(kind: str, memory: int) -> None:
    """One file; ranges inside it; what is converted changes; what is touched has that access; at last all private."""
    events = list(Generated(kind, memory, seed=3, count=300).events())
    created, *rest = events
    assert isinstance(created, event.GmemCreate) and created.size == memory
    pages = memory >> PAGE_SHIFT
    shared = BitMap64()
    for each in rest:
        if isinstance(each, event.GmemFault):
            size = 1 << each.order
            assert each.index % size == 0 and each.index + size <= pages
            assert shared.range_cardinality(each.index, each.index + size) == size * (each.access == "shared")
            continue
        assert isinstance(each, event.GmemConvert | event.GmemFolioFree)
        assert 0 <= each.start < each.end <= pages
        here = shared.range_cardinality(each.start, each.end)
        if isinstance(each, event.GmemFolioFree):
            assert not here
        elif each.to == "shared":
            assert not here
            shared.add_range(each.start, each.end)
        else:
            assert here == each.end - each.start
            shared.remove_range(each.start, each.end)
    assert not shared


@pytest.mark.parametrize("kind", GENERATORS)
def test_the_seed_makes_the_trace(kind: str) -> None:
    def events(seed: int) -> list[object]:
        return list(Generated(kind, 4 << 30, seed, 200).events())

    assert events(1) == events(1)
    assert events(1) != events(2)


@pytest.mark.parametrize("kind", GENERATORS)
@pytest.mark.parametrize("count", [0, 1, 2])
def test_small_counts(kind: str, count: int) -> None:
    assert list(Generated(kind, 1 << 30, 1, count).events())


def converted(source: Source, to: str) -> list[tuple[int, int]]:
    return [(e.start, e.end) for e in source.events() if isinstance(e, event.GmemConvert) and e.to == to]


def test_random_shares_a_quarter_of_its_count_and_takes_all_back() -> None:
    source = Generated("random", 1 << 40, 1, 4001)
    shared = converted(source, "shared")
    assert len(shared) == len(converted(source, "private")) == 2000
    assert all(end == start + 1 for start, end in shared)
    level = list(
        itertools.accumulate(1 if e.to == "shared" else -1 for e in source.events() if isinstance(e, event.GmemConvert))
    )
    assert 900 < max(level) < 1100
    touched = {start // G1 for start, _ in shared}
    assert len(touched) > 800, "spread over all of memory"


def test_random_in_a_small_memory_shares_no_more_than_there_is() -> None:
    level = list(
        itertools.accumulate(
            1 if e.to == "shared" else -1 for e in GENERATORS["random"](10, 1, 400) if isinstance(e, event.GmemConvert)
        )
    )
    assert (len(level), max(level), level[-1]) == (400, 10, 0)


@pytest.mark.parametrize(("gib", "mib"), [(1, 64), (4, 244), (16, 982), (64, 1024), (1024, 1024)])
def test_the_bounce_buffer_is_six_hundredths_of_memory_within_limits(gib: int, mib: int) -> None:
    first, last = swiotlb.region(gib * G1)
    assert (last - first) * 4096 >> 20 == mib
    assert last <= 3 * G1 and first % M2 == last % M2 == 0
    shared = converted(Generated("swiotlb", gib << 30, 1, 0), "shared")
    assert shared == [(start, start + M2) for start in range(first, last, M2)]


def test_transient_pools_are_as_large_as_a_segment_and_few_at_a_time() -> None:
    source = Generated("swiotlb", 8 << 30, 1, 2000)
    first, last = swiotlb.region(8 * G1)
    small = [(s, e) for s, e in converted(source, "shared") if not first <= s < last]
    sizes = {end - start for start, end in small}
    assert sizes <= {1, 2, 4, 8, 16, 32, 64, 256, 512, 1024}
    assert {1, 64} < sizes
    assert sum(end - start >= 256 for start, end in small) == 4, "a pool for good every 500 conversions"


def test_the_balloon_takes_mostly_blocks_and_never_more_than_a_quarter() -> None:
    events = list(Generated("balloon", 4 << 30, 1, 5000).events())
    holes = [e for e in events if isinstance(e, event.GmemFolioFree)]
    assert len(holes) == 5000
    blocks = sum(hole.end - hole.start == M2 for hole in holes)
    assert 0.6 < blocks / 5000 < 0.8
    away = most = 0
    for each in events[5:]:
        if isinstance(each, event.GmemFolioFree):
            away += each.end - each.start
        elif isinstance(each, event.GmemFault):
            away -= 1 << each.order
        most = max(most, away)
    assert away == 0
    assert G1 * 0.9 < most <= G1 + 32 * M2


def test_boot_shares_two_pages_for_each_vcpu_and_ends_as_kexec_does() -> None:
    assert [boot.vcpus(gib * G1) for gib in (1, 4, 64, 1024, 1 << 20)] == [1, 1, 16, 256, 1024]
    source = Generated("boot", 64 << 30, 1, 100)
    singles = [start for start, end in converted(source, "shared") if end == start + 1]
    assert len(singles) >= 2 * 16
    assert sum(end - start == M2 for start, end in converted(source, "shared")) == 512 + 1, "bounce buffer and .bss"


@pytest.mark.parametrize("memory", [0, MIN_MEMORY - (2 << 20), MIN_MEMORY + 4096, MAX_BYTES + (2 << 20)])
def test_memories_that_cannot_be(memory: int) -> None:
    with pytest.raises(Refusal, match=r"generate\.memory"):
        Generated("random", memory, 1, 1).events()
