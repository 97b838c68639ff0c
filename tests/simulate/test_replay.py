"""Replays whose answers can be reckoned by hand, and the one of the specification at a smaller scale."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import pytest

from guestmem.host import Host
from guestmem.memory import Access, Conversion, Split
from guestmem.memory.pages import ORDER_1G, ORDER_2M, ORDER_4K
from guestmem.simulate.generators import GENERATORS, Generated
from guestmem.simulate.generators.guest import convert, create, destroy, punch, share, touch, unshare
from guestmem.simulate.trace_file import TraceFile
from guestmem.trace import events as event
from guestmem.trace import json_writer
from guestmem.uapi.kvm import VmType
from tests.simulate.conftest import G1, M2, Listed, replay

PAGE = 4096
ONE_PAGE = Listed((create(G1), *touch(0, G1), *share(7, 8)))
BACK = Listed((*ONE_PAGE.listed, *unshare(7, 8)))


def test_a_shared_page_of_1g_splits_it_and_one_2m() -> None:
    row = replay(ONE_PAGE, ORDER_1G)
    assert (row.splits, row.merges, row.lost_most, row.refused) == ({"1g": 1, "2m": 1}, {}, 1, {})
    end = row.samples[-1]
    assert end.folio_bytes == {"1g": 0, "2m": 511 * M2 * PAGE, "4k": M2 * PAGE}
    assert end.leaves == {"1g": 0, "2m": 511, "4k": 512}
    assert end.table_bytes == 2 * PAGE
    assert (end.rmp_2m, end.rmp_4k, end.shared_bytes) == (511, 511, PAGE)
    assert (end.vmemmap_saved, end.vmemmap_given_back) == ((4095 - 518) * PAGE, 518 * PAGE)
    counts = row.counts
    assert (counts["fault"], counts["zap"], counts["refault"]) == (2, 1, 511 + 511)
    assert (counts["rmp_assign"], counts["psmash"], counts["rmp_reset"]) == (512, 1, 1)
    assert (counts["split"], counts["vmemmap_restore"], counts["vmemmap_optimise"]) == (1024, 518, 0)
    assert (counts["invalidation"], counts["flush"], counts["zero"]) == (2, 1, G1)
    assert row.tlb_reach_least == G1 * PAGE * 2048 // (511 + 512)


def test_and_wholly_if_that_is_the_policy() -> None:
    row = replay(ONE_PAGE, ORDER_1G, Split.WHOLE)
    end = row.samples[-1]
    assert row.splits == {"1g": 1, "2m": 512}
    assert end.leaves == {"1g": 0, "2m": 0, "4k": G1}
    assert end.vmemmap_given_back == 4095 * PAGE
    assert (row.counts["refault"], row.counts["psmash"]) == (G1 - 1, 512)


def test_taken_back_it_is_whole_again() -> None:
    for split in Split:
        row = replay(BACK, ORDER_1G, split, verify=True)
        assert row.problems == []
        assert row.splits == row.merges
        end = row.samples[-1]
        assert end.leaves == {"1g": 1, "2m": 0, "4k": 0}
        assert (end.vmemmap_given_back, end.table_bytes, end.rmp_2m, end.rmp_4k) == (0, 0, 512, 0)
        assert row.counts["unsmash"] == row.counts["psmash"]


def test_a_file_of_2m_pages_splits_one_of_them() -> None:
    row = replay(ONE_PAGE, ORDER_2M)
    assert row.splits == {"2m": 1}
    assert row.samples[-1].leaves == {"1g": 0, "2m": 511, "4k": 512}
    assert row.samples[-1].vmemmap_given_back == 7 * PAGE
    assert row.counts["refault"] == 511


def test_a_file_of_4k_pages_has_nothing_to_split() -> None:
    row = replay(BACK, ORDER_4K, verify=True)
    assert (row.splits, row.merges, row.lost_most, row.vmemmap_saved_at_start, row.problems) == ({}, {}, 0, 0, [])
    assert row.leaves_most == G1
    assert row.table_bytes_most == (512 + 1) * PAGE
    assert (row.counts["refault"], row.counts["zap"], row.counts["psmash"]) == (0, 2, 0)


def test_a_2m_that_is_shared_as_a_whole_resets_one_rmp_entry() -> None:
    row = replay(Listed((create(G1), *touch(0, G1), *share(M2, 2 * M2))), ORDER_2M)
    assert (row.counts["rmp_reset"], row.counts["psmash"]) == (1, 0)
    assert row.samples[-1].leaves == {"1g": 0, "2m": 511, "4k": 512}


def test_what_was_never_touched_is_not_mapped_again() -> None:
    row = replay(Listed((create(G1), *touch(0, 1), convert(1, 2, "shared"))), ORDER_4K)
    assert row.samples[-1].leaves == {"1g": 0, "2m": 0, "4k": 1}
    large = replay(Listed((create(G1), *touch(0, 1), convert(1, 2, "shared"))), ORDER_1G)
    assert large.samples[-1].leaves == {"1g": 0, "2m": 0, "4k": 1}
    assert (large.counts["zap"], large.counts["refault"]) == (1, 1)


def test_a_hole_in_a_part_of_a_huge_page_frees_nothing() -> None:
    trace = Listed((create(G1), *touch(0, G1), punch(0, M2)))
    freed = {order: replay(trace, order) for order in (ORDER_4K, ORDER_2M, ORDER_1G)}
    assert {order: row.counts["free"] for order, row in freed.items()} == {ORDER_4K: M2, ORDER_2M: 1, ORDER_1G: 0}
    held = {order: sum(row.samples[-1].folio_bytes.values()) for order, row in freed.items()}
    assert held == {ORDER_4K: (G1 - M2) * PAGE, ORDER_2M: (G1 - M2) * PAGE, ORDER_1G: G1 * PAGE}
    assert freed[ORDER_1G].counts["zero"] == G1 + M2
    assert (freed[ORDER_1G].counts["zap"], freed[ORDER_1G].counts["refault"]) == (1, 1)
    assert freed[ORDER_1G].holes == 1


def test_a_split_without_memory_for_its_struct_pages_is_refused_and_counted() -> None:
    row = replay(BACK, ORDER_1G, spare=517 * PAGE)
    assert row.refused == {"split.vmemmap": 1, "fault.access": 1}
    assert (row.splits, row.samples[-1].leaves["1g"], row.vmemmap_given_back_most) == ({}, 1, 0)
    assert replay(BACK, ORDER_1G, spare=518 * PAGE).refused == {}
    assert replay(BACK, ORDER_1G, Split.WHOLE, spare=4094 * PAGE).refused == {"split.vmemmap": 1, "fault.access": 1}
    assert replay(BACK, ORDER_1G, Split.WHOLE, spare=4095 * PAGE).refused == {}


def test_stepwise_does_what_it_can() -> None:
    trace = Listed((create(2 * G1), *touch(0, 2 * G1), convert(G1 - 1, G1 + 1, "shared")))
    room = {"spare": 518 * PAGE}
    atomic = replay(trace, ORDER_1G, **room)  # type: ignore[arg-type]
    stepwise = replay(trace, ORDER_1G, conversion=Conversion.STEPWISE, **room)  # type: ignore[arg-type]
    assert atomic.refused == stepwise.refused == {"split.vmemmap": 1}
    assert (atomic.samples[-1].shared_bytes, stepwise.samples[-1].shared_bytes) == (0, PAGE)
    assert stepwise.samples[-1].leaves == {"1g": 1, "2m": 511, "4k": 511}


def test_several_files_come_and_go() -> None:
    second = event.GmemCreate(2, 3 << 20, 3)
    trace = Listed(
        (
            create(G1),
            *touch(0, M2),
            second,
            event.GmemFault(2, 0, "userspace", "shared", 0, 0),
            event.GmemFault(2, 1, "kvm", "shared", 0, 0),
            event.GmemConvert(2, 0, 4, "private"),
            destroy(),
            event.GmemFolioAlloc(2, 0, 512),
            event.GmemDestroy(2),
        )
    )
    for order in (ORDER_4K, ORDER_2M, ORDER_1G):
        row = replay(trace, order, verify=True)
        assert (row.problems, row.refused) == ([], {})
        assert row.samples[-1].leaves == {"1g": 0, "2m": 0, "4k": 0}
        assert sum(row.samples[-1].folio_bytes.values()) == 0
        assert row.counts["flush"] >= 2, "both users of the second file had a leaf to drop"


def test_a_sparse_file_of_any_size_is_refused_its_huge_pages_and_that_is_all() -> None:
    size = (1 << 63) - PAGE
    pages = size // PAGE
    end = event.GmemFault(1, pages - 1, "kvm", "private", 0, 0)
    trace = Listed((event.GmemCreate(1, size, 1), end, convert(0, pages, "shared"), convert(0, pages, "private"), end))
    assert replay(trace, ORDER_1G, verify=True).refused == {"create.reservation": 1}
    row = replay(trace, ORDER_4K, verify=True)
    assert (row.refused, row.problems, row.leaves_most) == ({}, [], 1)


def test_a_recording_on_the_same_pages_splits_and_merges_the_same(tmp_path: Path) -> None:
    """What the recording machine did is in the trace, too, and is not looked at by the replay."""
    seen: list[event.Event] = []
    path = tmp_path / "trace.json"
    with path.open("w") as out, Host(memory=64 << 20, hugepages={ORDER_2M: 4}) as host:
        host.tracer.listen(json_writer(out, lambda: "test"))
        host.tracer.listen(seen.append)
        vm = host.create_vm(VmType.SW_PROTECTED)
        gmem = vm.create_guest_memfd(8 << 20, mmap=True, order=ORDER_2M)
        vm.set_memory_region(slot=0, gpa=0, size=8 << 20, gmem=gmem)
        vm.pre_fault(0, 8 << 20)
        gmem.convert(PAGE, PAGE, Access.SHARED)
        gmem.mmap(PAGE, PAGE)[0:5] = b"hello"
        gmem.convert(2 << 20, 4 << 20, Access.SHARED)
        gmem.punch_hole((2 << 20) - PAGE, 2 * PAGE)
        gmem.convert(0, 4 << 20, Access.PRIVATE)
        gmem.punch_hole(4 << 20, 2 << 20)
    recorded = [
        Counter({"2m": sum(each.folios for each in seen if isinstance(each, kind))})
        for kind in (event.GmemSplit, event.GmemMerge)
    ]
    row = replay(TraceFile(path), ORDER_2M, verify=True)
    assert [row.splits, row.merges] == recorded
    assert recorded[0]["2m"] == 3
    assert recorded[1]["2m"] == 2, "the third left the file"
    assert (row.conversions, row.holes, row.refused, row.problems) == (3, 2, {}, [])
    assert replay(TraceFile(path), ORDER_1G).splits == {"1g": 1, "2m": 3}


def test_a_slot_that_is_deleted_takes_its_leaves() -> None:
    trace = Listed((create(G1), *touch(0, G1), event.KvmUnbind(0, 0, 1, 0, G1)))
    row = replay(trace, ORDER_2M, verify=True)
    assert (row.counts["zap"], row.problems) == (512, [])
    assert row.samples[-1].leaves["2m"] == 0


def test_the_end_is_held_against_the_start() -> None:
    problems = replay(ONE_PAGE, ORDER_1G, verify=True).problems
    assert problems is not None
    assert [problem for problem in problems if "access that they were born with" in problem]
    assert [problem for problem in problems if "1 huge pages are split" in problem]
    assert [problem for problem in problems if "518 pages of vmemmap" in problem]
    assert len(problems) == 3, "closing the file brings everything back"


def test_samples_are_spread_over_the_trace() -> None:
    row = replay(Generated("random", 1 << 30, 1, 100), ORDER_2M, samples=7)
    events = [sample.events for sample in row.samples]
    assert len(events) == 7
    assert events[-1] == 2 + 200
    assert all(27 <= later - sooner <= 30 for sooner, later in itertools.pairwise(events))
    assert replay(ONE_PAGE, ORDER_2M, samples=1000).samples[-1].events == 4, "no more than there are events"


ROWS = [
    (ORDER_4K, Split.LAZY, Conversion.ATOMIC),
    *((order, split, conversion) for order in (ORDER_2M, ORDER_1G) for split in Split for conversion in Conversion),
]


@pytest.mark.parametrize("kind", GENERATORS)
@pytest.mark.parametrize(("order", "split", "conversion"), ROWS)
def test_every_kind_ends_as_it_began(kind: str, order: int, split: Split, conversion: Conversion) -> None:
    row = replay(Generated(kind, 4 << 30, 1, 150), order, split, conversion, verify=True)
    assert (row.problems, row.refused) == ([], {})
    assert row.splits == row.merges


@pytest.mark.parametrize("split", list(Split))
def test_thousands_of_random_conversions_and_every_huge_page_is_merged_again(split: Split) -> None:
    row = replay(Generated("random", 64 << 30, 1, 4000), ORDER_1G, split, verify=True)
    assert (row.problems, row.refused) == ([], {})
    assert row.measured.conversions == 4000
    assert row.lost_most == 64, "each of the huge pages was split"
    assert row.measured.state_bytes < 300 << 20
