"""PageTable against a dict of pages."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from guestmem.memory import PageTable, Range
from guestmem.memory.pages import block

LIMIT = 1 << 19


@given(st.lists(st.tuples(st.integers(0, LIMIT - 1), st.sampled_from([0, 0, 0, 9, 18])), max_size=12), st.data())
def test_a_page_table_maps_what_was_mapped_last(maps: list[tuple[int, int]], data: st.DataObject) -> None:
    table: PageTable[int, int] = PageTable()
    leaves: list[tuple[Range[int], int]] = []
    for leaf, (number, order) in enumerate(maps):
        table.map(number, order, leaf)
        new = block(number, order)
        leaves = [(old, value) for old, value in leaves if not old.overlaps(new)] + [(new, leaf)]
    start = data.draw(st.integers(0, LIMIT - 1))
    end = data.draw(st.integers(start + 1, LIMIT))
    gone = [entry for entry in leaves if entry[0].overlaps(Range(start, end))]
    assert table.zap(Range(start, end)) == len(gone)
    left = [entry for entry in leaves if entry not in gone]
    assert len(table) == len(left)
    assert sorted((number, value) for number, _, value in table.leaves()) == sorted(
        (span.start, value) for span, value in left
    )
    for number, order in maps:
        expected = next((value for span, value in left if span.contains(number)), None)
        assert table.lookup(number) == expected
        assert table.lookup(block(number, order).end - 1) == next(
            (value for span, value in left if span.contains(block(number, order).end - 1)), None
        )
