"""Address spaces and ranges."""

from __future__ import annotations

import pytest

from guestmem.memory.pages import PageIndex, Range, block, offset_of, page_range


@pytest.mark.parametrize(("offset", "size"), [(1, 4096), (0, 1), (0, 0), (-4096, 4096), (0, -4096), (4096, 4095)])
def test_page_range_of_what_is_no_range_is_none(offset: int, size: int) -> None:
    assert page_range(offset, size) is None


def test_page_range_and_offset_are_inverse() -> None:
    pages = page_range(0x3000, 0x2000)
    assert pages == Range(PageIndex(3), PageIndex(5))
    assert pages is not None
    assert offset_of(pages.start) == 0x3000


def test_ranges_are_half_open() -> None:
    pages = Range(2, 5)
    assert pages.pages == 3
    assert [pages.contains(number) for number in (1, 2, 4, 5)] == [False, True, True, False]
    assert pages.overlaps(Range(4, 9))
    assert not pages.overlaps(Range(5, 9))
    assert pages.intersection(Range(0, 3)) == Range(2, 3)
    assert pages.intersection(Range(5, 6)) is None
    assert pages.covers(Range(2, 5))
    assert not pages.covers(Range(2, 6))


def test_block_is_naturally_aligned() -> None:
    assert block(1000, 9) == Range(512, 1024)
    assert block(7, 0) == Range(7, 8)
