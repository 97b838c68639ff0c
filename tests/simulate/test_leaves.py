"""The entries that bitmaps stand for, against entries one by one."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guestmem.memory import Access, HugePolicy, PageIndex, Range, Split
from guestmem.simulate.leaves import Entries, Leaves
from guestmem.simulate.machine import Machine
from guestmem.simulate.row import Combination
from guestmem.simulate.source import Survey
from tests.simulate.conftest import G1, M2

PAGES = 2 * G1
PLACES = [0, 1, 5, M2 - 1, M2, M2 + 7, 3 * M2, G1 - 1, G1, G1 + 1, G1 + 4 * M2, PAGES - 1]
RANGES = st.sampled_from(PLACES).flatmap(
    lambda start: st.sampled_from([1, 2, M2, 2 * M2]).map(
        lambda size: Range(PageIndex(start), PageIndex(min(start + size, PAGES)))
    )
)
STEPS = st.lists(st.tuples(st.sampled_from(["share", "unshare", "touch", "remove"]), RANGES), max_size=12)


def meets(number: int, order: int, pages: Range[PageIndex]) -> bool:
    return number << order < pages.end and pages.start < (number + 1) << order


def naive(leaves: Leaves, machine: Machine, pages: Range[PageIndex]) -> Entries:
    """By walking the touched pages of each leaf that meets `pages`."""
    inode = machine.inodes[0]
    found: dict[tuple[int, int], set[int]] = {}
    for page in leaves.touched[0]:
        order = inode.folios.order_of(PageIndex(page))
        found.setdefault((order, page >> order), set()).add(page)
    here = {(order, number): touched for (order, number), touched in found.items() if meets(number, order, pages)}
    count = {order: sum(key[0] == order for key in here) for order in (0, 9, 18)}
    small = [number for order, number in here if order == 0]
    tables = len({number >> 9 for order, number in found if order == 0 and meets(number >> 9, 9, pages)})
    ends = {(number << order) >> 18 for order, number in found if order < 18}
    tables += sum(meets(number, 18, pages) for number in ends)
    large = {page >> 9 for (order, _), touched in here.items() if order for page in touched}
    if any(order == 18 for order, _ in here):  # of a 1G leaf those 2M that meet the pages
        large = {number for number in large if meets(number, 9, pages)}
    private = [number for number in small if inode.access_at(PageIndex(number)) is Access.PRIVATE]
    return Entries(count[0], count[9], count[18], tables, len(large), len(private))


@pytest.mark.parametrize(("order", "split"), [(0, Split.LAZY), (9, Split.LAZY), (18, Split.LAZY), (18, Split.WHOLE)])
@settings(max_examples=30, deadline=None)
@given(steps=STEPS, asked=RANGES)
def test_counts_are_those_of_entries_one_by_one(
    order: int, split: Split, steps: list[tuple[str, Range[PageIndex]]], asked: Range[PageIndex]
) -> None:
    survey = Survey(0, 0, {18: 2, 9: 1024, 0: PAGES})
    machine = Machine(Combination(order, HugePolicy(split)), survey, None)
    inode = machine.create(PAGES << 12, 1)
    machine.run(inode.allocate(Range(PageIndex(0), PageIndex(PAGES))))
    leaves = Leaves(inode.folios)
    for what, pages in steps:
        if what in ("share", "unshare"):
            leaves.remove(pages)
            machine.run(inode.convert(pages, Access.SHARED if what == "share" else Access.PRIVATE))
        elif what == "touch":
            for run, access in inode.runs(pages):
                leaves.add(run, access is Access.SHARED)
        else:
            leaves.remove(pages)
    everything = Range(PageIndex(0), PageIndex(PAGES))
    assert leaves.count(everything) == naive(leaves, machine, everything)
    assert leaves.count(asked) == naive(leaves, machine, asked)
    assert set(leaves.touched[9]) == {page >> 9 for page in leaves.touched[0]}
    assert set(leaves.touched[18]) == {page >> 18 for page in leaves.touched[0]}
