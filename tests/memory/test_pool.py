"""Pool: numbers, order of reuse, detached and retired pages."""

from __future__ import annotations

import errno

import pytest

from guestmem.memory import Pfn, Pool, Range
from guestmem.trace import Refusal


def one(pool: Pool) -> Pfn:
    (pfns,) = pool.allocate(1)
    return pfns.start


def test_the_most_recently_freed_page_comes_back_first() -> None:
    pool = Pool(8)
    first, second = one(pool), one(pool)
    pool.free(Range(first, Pfn(first + 1)))
    pool.free(Range(second, Pfn(second + 1)))
    assert [one(pool), one(pool)] == [second, first]
    pool.check()


def test_an_empty_pool_refuses_and_takes_nothing() -> None:
    pool = Pool(4)
    pool.allocate(3)
    with pytest.raises(Refusal) as caught:
        pool.allocate(2)
    assert (caught.value.errno, caught.value.rule) == (errno.ENOMEM, "pool.empty")
    assert caught.value.facts["free"] == 1
    assert pool.statistics().allocated == 3
    pool.allocate(1)
    pool.check()


@pytest.mark.parametrize("order", [0, 9])
def test_blocks_are_naturally_aligned(order: int) -> None:
    pool = Pool(4096)
    one(pool)
    for run in pool.allocate(2 << order, order):
        assert run.start % (1 << order) == 0
        assert run.pages % (1 << order) == 0
    one(pool)
    pool.check()


def test_a_double_free_stops_at_once() -> None:
    pool = Pool(4)
    pfn = one(pool)
    pool.free(Range(pfn, Pfn(pfn + 1)))
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(Range(pfn, Pfn(pfn + 1)))
