"""HugeTLB's books: reservations, subpools, nodes, the cgroup's counters, and HVO's."""

from __future__ import annotations

import errno
import random

import pytest

from guestmem.memory import ORDER_1G, ORDER_2M, Hugetlb, Pfn, Pool, Range
from guestmem.memory.hugetlb import HugePool, Subpool
from guestmem.memory.vmemmap import split_cost, vmemmap_pages
from guestmem.trace import Refusal

M2 = 1 << ORDER_2M


def counts(pool: HugePool) -> tuple[int, int, int, int]:
    return pool.total, pool.free, pool.reserved, pool.charged


def refused(call: object) -> tuple[int | None, str]:
    with pytest.raises(Refusal) as caught:
        call()  # type: ignore[operator]
    return caught.value.errno, caught.value.rule


def take(subpool: Subpool) -> Range[Pfn]:
    (page,) = subpool.allocate(M2, ORDER_2M)
    return page


def test_the_counters_of_create_allocate_hole_and_close() -> None:
    """semantics.md section 10, last line."""
    hugetlb = Hugetlb(Pool(64 * M2), {ORDER_2M: 8})
    pool = hugetlb.pools[ORDER_2M]
    assert counts(pool) == (8, 8, 0, 0)
    subpool = hugetlb.subpool(ORDER_2M, 3)
    assert counts(pool) == (8, 8, 3, 3)
    page = take(subpool)
    assert counts(pool) == (8, 7, 2, 3)
    subpool.free(page)
    assert counts(pool) == (8, 8, 3, 3)
    held = take(subpool)
    subpool.close()
    assert counts(pool) == (8, 7, 0, 1), "what is pinned is charged until it comes back"
    subpool.free(held)
    assert counts(pool) == (8, 8, 0, 0)
    hugetlb.check()


def test_a_reservation_is_whole_or_none() -> None:
    hugetlb = Hugetlb(Pool(64 * M2), {ORDER_2M: 4})
    first = hugetlb.subpool(ORDER_2M, 3)
    assert refused(lambda: hugetlb.subpool(ORDER_2M, 2)) == (errno.ENOMEM, "create.reservation")
    assert refused(lambda: hugetlb.subpool(ORDER_1G, 1)) == (errno.ENOMEM, "create.reservation")
    take(first)
    assert refused(lambda: hugetlb.subpool(ORDER_2M, 2)) == (errno.ENOMEM, "create.reservation")
    hugetlb.subpool(ORDER_2M, 1)
    hugetlb.check()


def test_huge_pages_are_kept_from_everybody_else() -> None:
    pool = Pool(4 * M2)
    hugetlb = Hugetlb(pool, {ORDER_2M: 3})
    saved = 3 * 7
    assert hugetlb.vmemmap.saved == saved
    assert pool.available == M2 + saved, "what HVO saves is memory for all"
    assert refused(lambda: pool.allocate(M2 + saved + 1)) == (errno.ENOMEM, "pool.empty")
    pool.allocate(M2 + saved)
    take(hugetlb.subpool(ORDER_2M, 3))
    pool.check()


def test_more_huge_pages_than_memory_are_refused() -> None:
    assert refused(lambda: Hugetlb(Pool(4 * M2), {ORDER_2M: 5})) == (errno.ENOMEM, "pool.empty")
    assert refused(lambda: Hugetlb(Pool(4 * M2), {ORDER_1G: 1})) == (errno.ENOMEM, "pool.empty")


def test_nodes_are_used_as_asked_and_counted_back() -> None:
    hugetlb = Hugetlb(Pool(64 * M2), {ORDER_2M: [2, 1]})
    pool = hugetlb.pools[ORDER_2M]
    pool.reserve(3)
    first, second = pool.take(node=1), pool.take(node=1)
    assert pool.free_by_node == [1, 0], "node 1 had one, the second is of node 0"
    pool.give(second, reserve=False)
    assert pool.free_by_node == [2, 0]
    pool.give(first, reserve=False)
    assert pool.free_by_node == [2, 1]
    pool.unreserve(1)
    pool.check()


def test_the_cgroups_limits_are_on_reservations_and_on_use() -> None:
    hugetlb = Hugetlb(Pool(64 * M2), {ORDER_2M: 8})
    pool = hugetlb.pools[ORDER_2M]
    pool.reservation_limit, pool.limit = 3, 1
    assert refused(lambda: hugetlb.subpool(ORDER_2M, 4)) == (errno.ENOMEM, "create.cgroup")
    subpool = hugetlb.subpool(ORDER_2M, 3)
    take(subpool)
    assert refused(lambda: take(subpool)) == (errno.ENOMEM, "pool.cgroup")
    assert counts(pool) == (8, 7, 2, 3)
    hugetlb.check()


def test_a_bad_huge_page_makes_the_pool_smaller_and_its_inode_poorer() -> None:
    hugetlb = Hugetlb(Pool(64 * M2), {ORDER_2M: 2})
    pool = hugetlb.pools[ORDER_2M]
    subpool = hugetlb.subpool(ORDER_2M, 2)
    subpool.retire(take(subpool))
    assert (*counts(pool), pool.retired) == (1, 1, 1, 1, 1)
    take(subpool)
    assert refused(lambda: take(subpool)) == (errno.ENOMEM, "pool.no_huge_page")
    hugetlb.check()


@pytest.mark.parametrize(
    ("order", "part", "pages"), [(9, 0, 7), (18, 9, 511), (18, 0, 4095), (20, 9, 2047), (2, 1, 0), (2, 0, 0)]
)
def test_what_a_split_must_give_back(order: int, part: int, pages: int) -> None:
    """64 bytes of struct page for each page, HVO keeps one page of them: 16 MiB for each GiB, less what is kept."""
    assert split_cost(order, part) == pages
    assert vmemmap_pages(18, optimised=False) * 4096 == 16 << 20


def test_splitting_by_steps_costs_as_much_as_at_once() -> None:
    assert split_cost(18, 9) + 512 * split_cost(9, 0) == split_cost(18, 0)


def test_the_text_has_the_kernels_names() -> None:
    hugetlb = Hugetlb(Pool(1 << 20), {ORDER_2M: [4, 4], ORDER_1G: 2})
    take(hugetlb.subpool(ORDER_2M, 3))
    lines = dict(line.split(" ") for line in hugetlb.text().splitlines())
    assert lines["hugepages-2048kB/nr_hugepages"] == "8"
    assert lines["hugepages-2048kB/free_hugepages"] == "7"
    assert lines["hugepages-2048kB/resv_hugepages"] == "2"
    assert lines["hugepages-2048kB/surplus_hugepages"] == "0"
    assert (lines["node0/hugepages-2048kB/free_hugepages"], lines["node1/hugepages-2048kB/free_hugepages"]) == (
        "3",
        "4",
    )
    assert lines["hugetlb.2MB.current"] == str(2 << 20)
    assert lines["hugetlb.2MB.rsvd.current"] == str(6 << 20)
    assert lines["hugetlb.1GB.current"] == "0"
    assert lines["vmemmap/saved"] == str(8 * 7 + 2 * 4095)


def test_any_sequence_of_calls_balances() -> None:
    rng = random.Random(3)
    pool = Pool(64 * M2)
    hugetlb = Hugetlb(pool, {ORDER_2M: [6, 6]})
    files: list[tuple[Subpool, list[Range[Pfn]]]] = []
    for _ in range(2000):
        what = rng.random()
        try:
            if what < 0.2:
                files.append((hugetlb.subpool(ORDER_2M, rng.randrange(1, 6)), []))
            elif files and what < 0.6:
                subpool, pages = rng.choice(files)
                if not subpool.closed:
                    pages.append(take(subpool))
            elif files and what < 0.9:
                subpool, pages = rng.choice(files)
                if pages:
                    subpool.free(pages.pop())
            elif files:
                subpool, _ = rng.choice(files)
                if not subpool.closed:
                    subpool.close()
        except Refusal as refusal:
            assert refusal.rule in ("create.reservation", "pool.no_huge_page")
        hugetlb.check()
        pool.check()
    for subpool, pages in files:
        for page in pages:
            subpool.free(page)
        if not subpool.closed:
            subpool.close()
    assert counts(hugetlb.pools[ORDER_2M]) == (12, 12, 0, 0)
    assert hugetlb.pools[ORDER_2M].free_by_node == [6, 6]
    pool.check()
