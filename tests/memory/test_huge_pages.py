"""Files of huge pages: private blocks stay huge, shared pages are split off, and everything merges again."""

from __future__ import annotations

import errno
from collections import Counter

import pytest

from guestmem.memory import (
    ORDER_1G,
    ORDER_2M,
    PAGE_SIZE,
    Access,
    Conversion,
    HugePolicy,
    Invalidation,
    PageIndex,
    Range,
    Split,
    UnmapFailed,
    read_host,
    write_host,
)
from guestmem.trace import EHWPOISON, Refusal
from guestmem.trace import events as event
from tests.explore import Follow, every_schedule
from tests.memory.conftest import Provider, RecordingUser, pages

GIB = 1 << ORDER_1G
MIB2 = 1 << ORDER_2M
WHOLE = HugePolicy(split=Split.WHOLE)
STEPWISE = HugePolicy(conversion=Conversion.STEPWISE)
TINY = (2, 1, 0)
"""Folios of 16, 8 and 4 KiB: the same code where every schedule can be run."""


def huge(pages_: int, order: int, *, init_shared: bool = False, policy: HugePolicy | None = None) -> Provider:
    return Provider(pages_, capacity=2 * pages_, order=order, init_shared=init_shared, huge_policy=policy)


def refused(provider: Provider, start: int, end: int, to: Access) -> Refusal:
    with pytest.raises(Refusal) as caught:
        provider.convert(start, end, to)
    return caught.value


def close(provider: Provider) -> None:
    """Everything goes, and every count is as it was at the start."""
    provider.inode.check()
    provider.close()
    provider.pool.check()
    provider.hugetlb.check()
    for pool in provider.hugetlb.pools.values():
        assert (pool.free, pool.reserved, pool.charged) == (pool.total, 0, 0)
        assert provider.hugetlb.vmemmap.saved == pool.total * pool._saved


def test_a_private_fault_gets_a_huge_folio_allocated_and_zeroed_as_one() -> None:
    provider = huge(1024, ORDER_2M)
    registration = provider.inode.register(RecordingUser())
    page = provider.run(provider.fault(registration, 700, Access.PRIVATE))
    assert page.order == ORDER_2M
    assert (page.pfn - 700) % MIB2 == 0
    assert provider.inode.statistics().allocated == MIB2
    zeroed = [seen for seen in provider.events if isinstance(seen, event.GmemFolioZero)]
    assert [(seen.start, seen.end) for seen in zeroed] == [(512, 1024)]
    close(provider)


@pytest.mark.parametrize("policy", [HugePolicy(), WHOLE])
def test_one_shared_page_splits_its_huge_page_and_coming_back_merges_it(policy: HugePolicy) -> None:
    provider = huge(2 * GIB, ORDER_1G, policy=policy)
    registration = provider.inode.register(RecordingUser())
    provider.run(provider.fault(registration, 0, Access.PRIVATE))
    provider.run(provider.fault(registration, GIB, Access.PRIVATE))
    saved = provider.hugetlb.vmemmap.saved
    provider.convert(GIB + 513, GIB + 514, Access.SHARED)
    folios = provider.inode.statistics().folios
    lazy = policy.split is Split.LAZY
    assert folios == ({18: 1, 9: 511, 0: 512} if lazy else {18: 1, 9: 0, 0: GIB})
    assert saved - provider.hugetlb.vmemmap.saved == (511 + 7 if lazy else 4095)
    assert provider.inode.mapping_order(PageIndex(5)) == 18
    assert provider.inode.mapping_order(PageIndex(GIB)) == (9 if lazy else 0)
    assert provider.inode.mapping_order(PageIndex(GIB + 513)) == 0
    provider.inode.check()
    provider.convert(GIB + 513, GIB + 514, Access.PRIVATE)
    statistics = provider.inode.statistics()
    assert statistics.folios == {18: 2, 9: 0, 0: 0}
    assert statistics.splits == statistics.merges
    assert provider.hugetlb.vmemmap.saved == saved
    assert provider.inode.mapping_order(PageIndex(GIB)) == 18
    close(provider)


def test_bytes_stay_in_place_over_splits_and_merges() -> None:
    provider = huge(MIB2, ORDER_2M)
    registration = provider.inode.register(RecordingUser())
    page = provider.run(provider.fault(registration, 0, Access.PRIVATE))
    for index in (0, 7, 511):
        write_host(page.hva + index * PAGE_SIZE, bytes([index % 251]) * 8)
    provider.convert(7, 8, Access.SHARED)
    provider.convert(7, 8, Access.PRIVATE)
    again = provider.run(provider.fault(registration, 7, Access.PRIVATE))
    assert (again.pfn, again.order) == (page.pfn + 7, ORDER_2M)
    assert [read_host(page.hva + index * PAGE_SIZE, 1)[0] for index in (0, 7, 511)] == [0, 7, 511 % 251]
    close(provider)


def test_pages_converted_before_they_are_there_are_split_at_allocation() -> None:
    """INIT_SHARED with huge pages is legal: pages come into the file split, when they come."""
    provider = huge(2 * MIB2, ORDER_2M, init_shared=True)
    registration = provider.inode.register(RecordingUser())
    provider.convert(MIB2, 2 * MIB2, Access.PRIVATE)
    assert provider.inode.statistics().splits == {}
    assert provider.run(provider.fault(registration, 3, Access.SHARED)).order == 0
    assert provider.run(provider.fault(registration, MIB2 + 3, Access.PRIVATE)).order == ORDER_2M
    assert provider.inode.statistics().folios == {9: 1, 0: MIB2}
    close(provider)


def test_a_split_that_cannot_have_its_struct_pages_changes_nothing_and_tells_nobody() -> None:
    """HVO: 16 MiB for each GiB must be there before anything is zapped."""
    provider = huge(GIB, ORDER_1G, policy=WHOLE)
    user = RecordingUser()
    registration = provider.inode.register(user)
    provider.run(provider.fault(registration, 0, Access.PRIVATE))
    taken = provider.pool.allocate(provider.pool.available - 4094)
    refusal = refused(provider, 5, 6, Access.SHARED)
    assert (refusal.errno, refusal.rule) == (errno.ENOMEM, "split.vmemmap")
    assert refusal.facts == {"wanted": 4095, "free": 4094, "error_offset": 5 * PAGE_SIZE}
    assert not user.told
    assert provider.inode.statistics().folios == {18: 1, 9: 0, 0: 0}
    provider.pool.free(Range(taken[0].start, taken[0].start + 1))  # type: ignore[arg-type]
    provider.convert(5, 6, Access.SHARED)
    provider.convert(5, 6, Access.PRIVATE)
    close(provider)


def test_a_held_huge_folio_is_not_split() -> None:
    provider = huge(2 * MIB2, ORDER_2M)
    user = RecordingUser()
    registration = provider.inode.register(user)
    provider.run(provider.fault(registration, MIB2 + 9, Access.PRIVATE))
    held = provider.inode.folios.get(PageIndex(MIB2 + 9))
    refusal = refused(provider, 3, MIB2 + 5, Access.SHARED)
    assert (refusal.errno, refusal.rule) == (errno.EAGAIN, "split.busy")
    assert refusal.facts["error_offset"] == MIB2 * PAGE_SIZE
    assert not user.told
    assert provider.inode.attributes.is_all(pages(0, 2 * MIB2), Access.PRIVATE)
    held.put()
    provider.convert(3, MIB2 + 5, Access.SHARED)
    close(provider)


def test_a_part_that_is_held_or_bad_keeps_its_huge_page_split() -> None:
    provider = huge(2 * MIB2, ORDER_2M, init_shared=True)
    registration = provider.inode.register(RecordingUser())
    for index in (0, MIB2):
        provider.run(provider.fault(registration, index, Access.SHARED))
    assert provider.run(provider.inode.memory_failure(PageIndex(4)))
    provider.convert(0, 2 * MIB2, Access.PRIVATE)
    assert provider.inode.statistics().folios == {9: 1, 0: MIB2}
    with pytest.raises(Refusal) as caught:
        provider.run(provider.fault(registration, 4, Access.PRIVATE))
    assert (caught.value.errno, caught.value.rule) == (EHWPOISON, "fault.poisoned")
    assert provider.run(provider.fault(registration, 5, Access.PRIVATE)).order == 0
    provider.inode.check()
    provider.run(provider.inode.punch_hole(pages(0, MIB2)))
    pool = provider.hugetlb.pools[ORDER_2M]
    assert (pool.total, pool.retired, pool.free) == (1, 1, 0)
    assert provider.pool.statistics().retired == MIB2
    with pytest.raises(Refusal) as caught:
        provider.run(provider.fault(registration, 5, Access.PRIVATE))
    assert (caught.value.errno, caught.value.rule) == (errno.ENOMEM, "pool.no_huge_page")
    provider.close()
    pool.check()
    assert (pool.free, pool.reserved, pool.charged) == (1, 0, 0)


def test_pages_are_zeroed_once_even_if_only_some_parts_were_before_a_merge() -> None:
    """S12: splits and merges between two first faults neither lose bytes nor zero twice."""
    provider = huge(MIB2, ORDER_2M, init_shared=True)
    registration = provider.inode.register(RecordingUser())
    shared = provider.run(provider.fault(registration, 3, Access.SHARED))
    write_host(shared.hva, b"kept")
    provider.convert(0, MIB2, Access.PRIVATE)
    page = provider.run(provider.fault(registration, 100, Access.PRIVATE))
    assert page.order == ORDER_2M
    assert read_host(shared.hva, 4) == b"kept"
    times = Counter(
        index
        for seen in provider.events
        if isinstance(seen, event.GmemFolioZero)
        for index in range(seen.start, seen.end)
    )
    assert set(times) == set(range(MIB2))
    assert set(times.values()) == {1}
    close(provider)


# Invalidation


def test_the_window_is_rounded_to_the_huge_page_and_the_zap_is_not() -> None:
    provider = huge(2 * MIB2, ORDER_2M)
    user = RecordingUser()
    provider.inode.register(user)
    provider.convert(MIB2 + 1, MIB2 + 2, Access.SHARED)
    (_, told), _ = user.told
    assert told.pages == pages(MIB2 + 1, MIB2 + 2)
    assert told.hull == pages(MIB2, 2 * MIB2)
    close(provider)


# All or nothing, or one huge page at a time


@pytest.mark.parametrize("policy", [HugePolicy(), STEPWISE])
def test_a_busy_page_stops_all_of_a_conversion_or_what_comes_after_it(policy: HugePolicy) -> None:
    provider = huge(4 * MIB2, ORDER_2M, init_shared=True, policy=policy)
    registration = provider.inode.register(RecordingUser(takes_references=True))
    for start in range(0, 4 * MIB2, MIB2):
        provider.run(provider.fault(registration, start, Access.SHARED))
    pin = provider.inode.folios.get(PageIndex(2 * MIB2 + 7))
    refusal = refused(provider, 5, 4 * MIB2, Access.PRIVATE)
    assert (refusal.errno, refusal.rule) == (errno.EAGAIN, "convert.busy")
    runs = [(run.start, run.end, access) for run, access in provider.inode.runs(pages(0, 4 * MIB2))]
    if policy.conversion is Conversion.ATOMIC:
        assert refusal.facts["error_offset"] == (2 * MIB2 + 7) * PAGE_SIZE
        assert runs == [(0, 4 * MIB2, Access.SHARED)]
    else:
        assert refusal.facts["error_offset"] == 2 * MIB2 * PAGE_SIZE, "done up to here, and nothing beyond"
        assert refusal.facts["at"] == (2 * MIB2 + 7) * PAGE_SIZE
        assert runs == [
            (0, 5, Access.SHARED),
            (5, 2 * MIB2, Access.PRIVATE),
            (2 * MIB2, 4 * MIB2, Access.SHARED),
        ]
        assert provider.inode.statistics().folios == {9: 1, 0: 3 * MIB2}
    pin.put()
    provider.convert(0, 4 * MIB2, Access.PRIVATE)
    assert provider.inode.statistics().folios == {9: 4, 0: 0}
    close(provider)


def test_a_user_that_cannot_unmap_leaves_the_folio_whole_and_its_struct_pages_where_they_were() -> None:
    provider = huge(MIB2, ORDER_2M)

    def refuse(invalidation: Invalidation) -> None:
        raise UnmapFailed(invalidation.pages, "firmware is busy")

    registration = provider.inode.register(RecordingUser(on_begin=refuse))
    provider.run(provider.fault(registration, 0, Access.PRIVATE))
    saved = provider.hugetlb.vmemmap.saved
    assert refused(provider, 1, 2, Access.SHARED).rule == "convert.bad_page"
    assert provider.inode.statistics().folios == {9: 1, 0: 0}
    assert provider.hugetlb.vmemmap.saved == saved
    provider.close()


# Holes and the end


def test_a_hole_frees_whole_huge_pages_and_zeroes_parts() -> None:
    provider = huge(4 * MIB2, ORDER_2M)
    registration = provider.inode.register(RecordingUser())
    for start in range(0, 4 * MIB2, MIB2):
        page = provider.run(provider.fault(registration, start, Access.PRIVATE))
        write_host(page.hva, b"x" * (MIB2 * PAGE_SIZE))
    pool = provider.hugetlb.pools[ORDER_2M]
    provider.run(provider.inode.fallocate(3, 4 * PAGE_SIZE, 3 * MIB2 * PAGE_SIZE))
    assert provider.inode.statistics().allocated == 2 * MIB2, "the first and the last stay"
    assert (pool.free, pool.reserved) == (2, 2)
    first = provider.run(provider.fault(registration, 0, Access.PRIVATE))
    assert read_host(first.hva, 4 * PAGE_SIZE) == b"x" * (4 * PAGE_SIZE)
    assert read_host(first.hva + 4 * PAGE_SIZE, 508 * PAGE_SIZE) == bytes(508 * PAGE_SIZE)
    last = provider.run(provider.fault(registration, 3 * MIB2, Access.PRIVATE))
    assert read_host(last.hva, 5 * PAGE_SIZE) == bytes(4 * PAGE_SIZE) + b"x" * PAGE_SIZE
    assert last.order == ORDER_2M
    close(provider)


def test_allocation_is_by_whole_huge_pages_only() -> None:
    provider = huge(4 * MIB2, ORDER_2M)
    for offset, length in ((0, PAGE_SIZE), (PAGE_SIZE, MIB2 * PAGE_SIZE)):
        with pytest.raises(Refusal) as caught:
            provider.run(provider.inode.fallocate(1, offset, length))
        assert (caught.value.errno, caught.value.rule) == (errno.EINVAL, "fallocate.unaligned")
    provider.run(provider.inode.fallocate(1, MIB2 * PAGE_SIZE, 2 * MIB2 * PAGE_SIZE))
    assert provider.inode.statistics().folios == {9: 2, 0: 0}
    close(provider)


def test_a_pinned_part_keeps_the_whole_hole_from_happening() -> None:
    provider = huge(4 * MIB2, ORDER_2M, init_shared=True)
    registration = provider.inode.register(RecordingUser(takes_references=True))
    for start in range(0, 4 * MIB2, MIB2):
        provider.run(provider.fault(registration, start, Access.SHARED))
    pin = provider.inode.folios.get(PageIndex(2 * MIB2 + 7))
    bystander = RecordingUser()
    provider.inode.register(bystander)
    with pytest.raises(Refusal) as caught:
        provider.run(provider.inode.punch_hole(pages(1, 4 * MIB2)))
    assert not bystander.told, "who would give private pages back has not lost their bytes for nothing (S15)"
    assert (caught.value.errno, caught.value.rule) == (errno.EAGAIN, "punch.busy")
    assert caught.value.facts["offset"] == (2 * MIB2 + 7) * PAGE_SIZE
    assert provider.inode.statistics().allocated == 4 * MIB2
    provider.run(provider.inode.punch_hole(pages(2 * MIB2, 2 * MIB2 + 9)))  # only a part of it: zeroed where it is
    assert read_host(pin.hva, PAGE_SIZE) == bytes(PAGE_SIZE)
    pin.put()
    provider.run(provider.inode.punch_hole(pages(0, 4 * MIB2)))
    assert provider.inode.statistics().allocated == 0
    assert provider.hugetlb.vmemmap.saved == 4 * 7
    close(provider)


def test_closed_while_pinned_the_memory_comes_back_at_the_last_put() -> None:
    """Long after the file: merged by the last put of any part, and to the pool that it came from."""
    provider = huge(2 * MIB2, ORDER_2M, init_shared=True)
    registration = provider.inode.register(RecordingUser(takes_references=True))
    for index in (3, 4, MIB2):
        page = provider.run(provider.fault(registration, index, Access.SHARED))
        write_host(page.hva, b"page %d" % index)
    pins = [provider.inode.folios.get(PageIndex(index)) for index in (3, 4, 4)]
    pool, vmemmap = provider.hugetlb.pools[ORDER_2M], provider.hugetlb.vmemmap
    provider.close()
    assert (pool.free, pool.used, pool.reserved, pool.charged, vmemmap.saved) == (1, 1, 0, 1, 7)
    assert provider.pool.statistics().detached == MIB2
    assert [read_host(pin.hva, 6) for pin in pins] == [b"page 3", b"page 4", b"page 4"]
    for pin in pins:
        assert pool.free == 1
        pin.put()
    assert (pool.free, pool.used, pool.charged, vmemmap.saved) == (2, 0, 0, 14)
    provider.pool.check()
    pool.check()


def test_two_faults_on_a_huge_page_take_one_from_the_reservation_in_every_schedule() -> None:
    """Open in the posting: both may take one from the subpool, and the second then fails for nothing."""

    def scenario(policy: Follow) -> None:
        provider = Provider(4, capacity=8, order=2, orders=TINY, policy=policy)
        registration = provider.inode.register(RecordingUser())
        tasks = [
            provider.scheduler.spawn(provider.fault(registration, index, Access.PRIVATE), name)
            for index, name in ((0, "one"), (3, "two"))
        ]
        provider.scheduler.drain()
        assert tasks[0].outcome().pfn + 3 == tasks[1].outcome().pfn
        close(provider)

    assert every_schedule(scenario) > 10


def test_a_split_that_fails_at_any_step_leaves_everything_as_it_was() -> None:
    outcomes: set[str] = set()

    def scenario(policy: Follow) -> None:
        provider = Provider(8, capacity=16, order=2, orders=TINY, policy=policy, hugepages=2)
        registration = provider.inode.register(RecordingUser())
        try:
            provider.run(provider.fault(registration, 0, Access.PRIVATE))
            provider.convert(1, 2, Access.SHARED)
            assert provider.inode.statistics().folios == {2: 0, 1: 1, 0: 2}
            outcomes.add("done")
        except Refusal as refusal:
            assert provider.inode.attributes.is_all(pages(0, 8), Access.PRIVATE)
            assert provider.inode.statistics().splits == {}
            outcomes.add(refusal.rule)
        close(provider)

    every_schedule(scenario, failures=1)
    assert outcomes == {"done", "convert.nomem", "split.vmemmap", "pool.no_huge_page"}


@pytest.mark.parametrize("policy", [HugePolicy(), WHOLE, STEPWISE])
def test_random_conversions_end_with_every_huge_page_merged(policy: HugePolicy) -> None:
    import random

    rng = random.Random(7)
    provider = huge(2 * GIB, ORDER_1G, policy=policy)
    registration = provider.inode.register(RecordingUser())
    for start in (0, GIB):
        provider.run(provider.fault(registration, start, Access.PRIVATE))
    shared: set[int] = set()
    for _ in range(300):
        start = rng.randrange(2 * GIB - 2048)
        end = start + rng.choice((1, 1, 1, 2, 512, 2048))
        to = rng.choice((Access.SHARED, Access.PRIVATE))
        provider.convert(start, end, to)
        (shared.update if to is Access.SHARED else shared.difference_update)(range(start, end))
        if policy.split is Split.LAZY:
            assert provider.inode.statistics().folios[0] == 512 * len({page >> 9 for page in shared})
    provider.inode.check()
    provider.convert(0, 2 * GIB, Access.PRIVATE)
    statistics = provider.inode.statistics()
    assert statistics.folios == {18: 2, 9: 0, 0: 0}
    assert statistics.splits == statistics.merges
    close(provider)
