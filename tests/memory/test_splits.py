"""Splits against the definition: a folio is the largest block that is private throughout and not held."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guestmem.memory import PageIndex, Range
from guestmem.memory.pages import PageRange, block
from guestmem.memory.splits import Splits, hull
from tests.memory.conftest import pages

ORDERS = (4, 2, 0)
PAGES = 64
steps = st.lists(
    st.tuples(st.booleans(), st.integers(0, PAGES - 1), st.integers(1, PAGES)).map(
        lambda step: (step[0], step[1], min(step[1] + step[2], PAGES))
    ),
    max_size=12,
)


def expected_order(index: int, shared: set[int], whole: bool) -> int:
    for order in ORDERS:
        folio = block(index, order)
        if shared.isdisjoint(range(folio.start, folio.end)):
            return order
        if whole:
            return 0
    return 0


@pytest.mark.parametrize("whole", [False, True])
@settings(max_examples=300, deadline=None)
@given(steps=steps)
def test_the_shape_follows_what_is_shared(whole: bool, steps: list[tuple[bool, int, int]]) -> None:
    splits = Splits(ORDERS, whole)
    shared: set[int] = set()

    def is_private(folio: PageRange) -> bool:
        return shared.isdisjoint(range(folio.start, folio.end))

    vmemmap = 0
    for to_shared, start, end in steps:
        if to_shared:
            plan = splits.missing(pages(start, end))
            splits.apply(plan)
            shared.update(range(start, end))
            vmemmap += splits.cost(plan)
            assert not splits.missing(pages(start, end))
        else:
            shared.difference_update(range(start, end))
            vmemmap -= splits.cost(splits.merge(pages(start, end), is_private, lambda folio: False))
        got = [splits.order_of(PageIndex(index)) for index in range(PAGES)]
        assert got == [expected_order(index, shared, whole) for index in range(PAGES)]
        assert sum(count << order for order, count in splits.folios(PAGES).items()) == PAGES
        assert vmemmap == splits.cost(list(splits.split.items()))


def test_what_is_held_stays_split_and_is_merged_with_the_next_conversion() -> None:
    splits = Splits(ORDERS, whole=False)
    splits.apply(splits.missing(pages(0, 32)))
    held = {PageIndex(5)}

    def is_held(folio: PageRange) -> bool:
        return any(folio.contains(index) for index in held)

    splits.merge(pages(0, 32), lambda folio: True, is_held)
    assert [splits.order_of(PageIndex(index)) for index in (0, 4, 7, 8, 16)] == [2, 0, 0, 2, 4]
    held.clear()
    splits.merge(pages(4, 5), lambda folio: True, is_held)
    assert splits.folios(PAGES) == {4: 4, 2: 0, 0: 0}


def test_a_huge_page_that_leaves_is_forgotten() -> None:
    splits = Splits(ORDERS, whole=False)
    splits.apply(splits.missing(pages(3, 30)))
    forgotten = splits.forget(pages(16, 32))
    assert [(order, set(blocks)) for order, blocks in forgotten] == [(4, {1}), (2, {4, 5, 6, 7})]
    assert splits.order_of(PageIndex(20)) == 4
    assert splits.order_of(PageIndex(3)) == 0


@pytest.mark.parametrize(
    ("start", "end", "order", "expected"), [(5, 6, 2, (4, 8)), (4, 8, 2, (4, 8)), (0, 9, 3, (0, 16))]
)
def test_hull(start: int, end: int, order: int, expected: tuple[int, int]) -> None:
    assert hull(pages(start, end), order) == Range(*map(PageIndex, expected))
