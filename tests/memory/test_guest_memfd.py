"""The provider: faults, conversion, holes, poison, the end. Requirements by their R and Q numbers."""

from __future__ import annotations

import errno

import pytest

from guestmem.memory import PAGE_SIZE, Access, Invalidation, PageIndex, Pfn, Range, UnmapFailed, read_host, write_host
from guestmem.memory.backing import JUNK
from guestmem.trace import EHWPOISON, Refusal
from guestmem.trace import events as event
from tests.explore import Follow, every_schedule
from tests.memory.conftest import Provider, RecordingUser, pages


@pytest.mark.parametrize("state", list(Access))
@pytest.mark.parametrize("asked", list(Access))
def test_a_fault_gets_a_page_only_if_it_asks_for_the_access_that_the_page_has(state: Access, asked: Access) -> None:
    """R3: four cells; the mismatching two give an error and change nothing."""
    provider = Provider(init_shared=state is Access.SHARED)
    registration = provider.inode.register(RecordingUser())
    if asked is state:
        page = provider.run(provider.fault(registration, 3, asked))
        assert read_host(page.hva, PAGE_SIZE) == bytes(PAGE_SIZE)
    else:
        with pytest.raises(Refusal) as caught:
            provider.run(provider.fault(registration, 3, asked))
        assert (caught.value.errno, caught.value.rule) == (errno.EFAULT, "fault.access")
        assert provider.inode.statistics().allocated == 0
    provider.close()


def test_every_user_gets_the_same_page_and_sees_the_same_bytes() -> None:
    """R1, R4: no user is special; a fourth one needs no change in the core."""
    provider = Provider(init_shared=True)
    registrations = [provider.inode.register(RecordingUser(kind)) for kind in ("userspace", "kvm", "iommu", "fourth")]
    got = [provider.run(provider.fault(registration, 5, Access.SHARED)) for registration in registrations]
    assert len({page.pfn for page in got}) == 1
    write_host(got[0].hva, b"common")
    assert all(read_host(page.hva, 6) == b"common" for page in got)
    assert provider.inode.statistics().faults == {
        (kind, "shared"): 1 for kind in ("userspace", "kvm", "iommu", "fourth")
    }
    provider.close()


def test_a_user_that_may_not_map_private_pages_never_gets_one(provider: Provider) -> None:
    """R5, and not because of what the user is called (Q4)."""
    registration = provider.inode.register(RecordingUser("kvm", may_map_private=False))
    for asked, rule in ((Access.PRIVATE, "fault.user_private"), (Access.SHARED, "fault.access")):
        with pytest.raises(Refusal) as caught:
            provider.run(provider.fault(registration, 0, asked))
        assert caught.value.rule == rule


@pytest.mark.parametrize("index", [-1, 16, 1 << 60])
def test_a_fault_past_the_end_is_refused(provider: Provider, index: int) -> None:
    registration = provider.inode.register(RecordingUser())
    with pytest.raises(Refusal) as caught:
        provider.run(provider.fault(registration, index, Access.PRIVATE))
    assert caught.value.rule == "fault.past_end"


def test_pages_are_zeroed_once_in_each_life(provider: Provider) -> None:
    """S12: freed pages hold junk in debug mode, so zeroing is real; a second fault leaves the bytes alone."""
    registration = provider.inode.register(RecordingUser())
    page = provider.run(provider.fault(registration, 0, Access.PRIVATE))
    write_host(page.hva, b"secret")
    assert read_host(provider.run(provider.fault(registration, 0, Access.PRIVATE)).hva, 6) == b"secret"
    provider.run(provider.inode.punch_hole(pages(0, 1)))
    assert read_host(page.hva, 6) == bytes([JUNK] * 6), "a stale mapping sees junk, not the secret"
    again = provider.run(provider.fault(registration, 0, Access.PRIVATE))
    assert read_host(again.hva, 6) == bytes(6)
    zeroed = [seen for seen in provider.events if isinstance(seen, event.GmemFolioZero)]
    assert len(zeroed) == 2


def test_two_faults_on_a_new_page_share_it_and_zero_it_once_in_every_schedule() -> None:
    def scenario(policy: Follow) -> None:
        provider = Provider(pages=1, capacity=2, policy=policy)
        registration = provider.inode.register(RecordingUser())
        tasks = [
            provider.scheduler.spawn(provider.fault(registration, 0, Access.PRIVATE), name) for name in ("one", "two")
        ]
        provider.scheduler.drain()
        assert len({task.outcome().pfn for task in tasks}) == 1
        zeroed = [seen for seen in provider.events if isinstance(seen, event.GmemFolioZero)]
        assert len(zeroed) == 1
        assert provider.pool.statistics().allocated == 1
        provider.inode.check()
        provider.pool.check()
        assert not provider.inode.folios.locks
        assert not provider.inode.folios.references
        provider.close()

    assert every_schedule(scenario) > 50


# Conversion


def test_conversion_changes_exactly_the_range_and_keeps_bytes_in_place(provider: Provider) -> None:
    registration = provider.inode.register(RecordingUser())
    page = provider.run(provider.fault(registration, 4, Access.PRIVATE))
    write_host(page.hva, b"kept")
    provider.convert(4, 6, Access.SHARED)
    assert [(run.start, run.end, access) for run, access in provider.inode.runs(pages(0, 16))] == [
        (0, 4, Access.PRIVATE),
        (4, 6, Access.SHARED),
        (6, 16, Access.PRIVATE),
    ]
    shared = provider.run(provider.fault(registration, 4, Access.SHARED))
    assert (shared.pfn, shared.hva) == (page.pfn, page.hva), "in place: the same page, no copy"
    assert read_host(shared.hva, 4) == b"kept"


def test_a_referenced_page_makes_the_whole_conversion_busy_and_changes_nothing(provider: Provider) -> None:
    """semantics.md 3.4: whole request EAGAIN at the pinned page; single pages convert; after unpin all do."""
    provider.convert(0, 8, Access.SHARED)
    user = RecordingUser(takes_references=True)
    registration = provider.inode.register(user)
    for index in range(8):
        provider.run(provider.fault(registration, index, Access.SHARED))
    pins = [provider.inode.folios.get(PageIndex(index)) for index in (5, 3)]
    with pytest.raises(Refusal) as caught:
        provider.convert(0, 8, Access.PRIVATE)
    assert (caught.value.errno, caught.value.rule) == (errno.EAGAIN, "convert.busy")
    assert caught.value.facts["error_offset"] == 3 * PAGE_SIZE, "the first one"
    assert provider.inode.attributes.is_all(pages(0, 8), Access.SHARED)
    assert [step for step, _ in user.told] == ["begin", "end"], "its mappings went, and may come back"
    with pytest.raises(Refusal) as caught:
        provider.convert(4, 8, Access.PRIVATE)
    assert caught.value.facts["error_offset"] == 5 * PAGE_SIZE
    for index in (0, 1, 2, 4, 6, 7):
        provider.convert(index, index + 1, Access.PRIVATE)
    for pin in pins:
        pin.put()
    provider.convert(0, 8, Access.PRIVATE)


def test_to_shared_needs_no_look_at_references(provider: Provider) -> None:
    registration = provider.inode.register(RecordingUser())
    provider.run(provider.fault(registration, 0, Access.PRIVATE))
    held = provider.inode.folios.get(PageIndex(0))
    provider.convert(0, 1, Access.SHARED)
    assert provider.inode.access_at(PageIndex(0)) is Access.SHARED
    held.put()


def test_conversion_needs_no_folios(provider: Provider) -> None:
    provider.convert(0, 16, Access.SHARED)
    provider.convert(2, 9, Access.PRIVATE)
    assert provider.inode.statistics().allocated == 0
    assert provider.inode.statistics().private == 7


def test_a_failed_preallocation_changes_nothing_and_tells_nobody() -> None:
    outcomes: set[str] = set()

    def scenario(policy: Follow) -> None:
        provider = Provider(pages=2, policy=policy)
        user = RecordingUser()
        provider.inode.register(user)
        try:
            provider.convert(0, 1, Access.SHARED)
            outcomes.add("done")
        except Refusal as refusal:
            assert (refusal.errno, refusal.rule) == (errno.ENOMEM, "convert.nomem")
            assert refusal.facts["error_offset"] == 0
            assert not user.told
            assert provider.inode.attributes.is_all(pages(0, 2), Access.PRIVATE)
            outcomes.add("refused")
        provider.close()

    every_schedule(scenario, failures=1)
    assert outcomes == {"done", "refused"}


def test_a_user_that_cannot_unmap_is_recorded_and_the_page_never_changes_hands() -> None:
    """Q12, S19, known bug B53: the provider looks again after the zap, and bails out before the state is stored."""
    provider = Provider()
    stuck = pages(2, 3)

    def refuse(invalidation: Invalidation) -> None:
        if invalidation.pages.overlaps(stuck):
            raise UnmapFailed(stuck, "firmware is busy")

    user, bystander, giver = RecordingUser(on_begin=refuse), RecordingUser("bystander"), RecordingUser("giver")
    provider.inode.register(giver, last=True)
    registration = provider.inode.register(user)
    provider.inode.register(bystander)
    page = provider.run(provider.fault(registration, 2, Access.PRIVATE))
    with pytest.raises(Refusal) as caught:
        provider.convert(0, 4, Access.SHARED)
    assert (caught.value.errno, caught.value.rule) == (EHWPOISON, "convert.bad_page")
    assert caught.value.facts["error_offset"] == 2 * PAGE_SIZE
    assert provider.inode.attributes.is_all(pages(0, 4), Access.PRIVATE)
    assert [step for step, _ in bystander.told] == ["begin", "end"], "a failing user cannot stop the operation (R15)"
    assert not giver.told, "nobody has given back pages, and lost their bytes, for a conversion that is refused (S15)"
    with pytest.raises(Refusal) as caught:
        provider.run(provider.fault(registration, 2, Access.PRIVATE))
    assert caught.value.rule == "fault.poisoned"
    provider.run(provider.inode.punch_hole(pages(0, 16)))
    assert page.pfn in provider.pool.retired
    fresh = provider.run(provider.fault(registration, 5, Access.PRIVATE))
    assert fresh.pfn != page.pfn, "never recycled"
    provider.close()
    assert provider.pool.statistics().allocated == 1


# fallocate and holes


def test_allocating_maps_nothing_and_tells_nobody(provider: Provider) -> None:
    """R2, R9."""
    user = RecordingUser()
    provider.inode.register(user)
    provider.run(provider.inode.fallocate(1, 0, 8 * PAGE_SIZE))
    statistics = provider.inode.statistics()
    assert statistics.allocated == 8
    assert not statistics.faults
    assert not user.told
    assert not provider.inode.folios.uptodate, "zeroing is the first fault's"
    provider.run(provider.inode.fallocate(1, 4 * PAGE_SIZE, 8 * PAGE_SIZE))
    assert provider.inode.statistics().allocated == 12


def test_a_hole_frees_pages_keeps_access_and_may_reach_beyond_the_end(provider: Provider) -> None:
    provider.convert(0, 2, Access.SHARED)
    provider.run(provider.inode.fallocate(1, 0, 16 * PAGE_SIZE))
    provider.run(provider.inode.fallocate(3, PAGE_SIZE, 3 * PAGE_SIZE))
    assert provider.inode.statistics().allocated == 13
    assert provider.inode.attributes.is_all(pages(0, 2), Access.SHARED)
    provider.run(provider.inode.fallocate(3, 15 * PAGE_SIZE, 1 << 40))
    assert provider.inode.statistics().allocated == 12
    provider.run(provider.inode.fallocate(3, 16 * PAGE_SIZE, PAGE_SIZE))
    assert provider.pool.statistics().allocated == 12


def test_a_hole_tells_before_a_page_leaves_the_file(provider: Provider) -> None:
    """R8."""
    present: list[bool] = []
    user = RecordingUser(on_begin=lambda invalidation: present.append(0 in provider.inode.folios.present))
    registration = provider.inode.register(user)
    provider.run(provider.fault(registration, 0, Access.PRIVATE))
    provider.run(provider.inode.punch_hole(pages(0, 1)))
    assert present == [True]
    assert 0 not in provider.inode.folios.present


def test_a_pinned_page_outlives_its_hole_and_its_file() -> None:
    provider = Provider(init_shared=True)
    registration = provider.inode.register(RecordingUser())
    page = provider.run(provider.fault(registration, 0, Access.SHARED))
    write_host(page.hva, b"mine")
    first, second = provider.inode.folios.get(PageIndex(0)), provider.inode.folios.get(PageIndex(0))
    provider.run(provider.inode.punch_hole(pages(0, 1)))
    assert read_host(first.hva, 4) == b"mine"
    assert provider.pool.statistics().detached == 1
    fresh = provider.run(provider.fault(registration, 0, Access.SHARED))
    assert fresh.pfn != page.pfn
    assert read_host(fresh.hva, 4) == bytes(4)
    first.put()
    provider.close()
    assert read_host(second.hva, 4) == b"mine"
    second.put()
    assert provider.pool.statistics().allocated == 0
    with pytest.raises(AssertionError, match="put twice"):
        second.put()


def test_allocation_stops_at_a_signal_and_keeps_what_it_has(provider: Provider) -> None:
    provider.inode.allocate_batch = 4

    async def allocate() -> None:
        current = provider.scheduler.current
        assert current is not None
        insert = provider.inode.folios.insert

        def insert_then_signal(new: Range[PageIndex], pfns: list[Range[Pfn]]) -> None:
            insert(new, pfns)
            current.signal_pending = True

        provider.inode.folios.insert = insert_then_signal  # type: ignore[method-assign,assignment]
        await provider.inode.fallocate(1, 0, 16 * PAGE_SIZE)

    with pytest.raises(Refusal) as caught:
        provider.run(allocate())
    assert (caught.value.errno, caught.value.rule) == (errno.EINTR, "fallocate.interrupted")
    assert provider.inode.statistics().allocated == 4


def test_an_exhausted_pool_is_enomem_for_allocation_and_fault() -> None:
    provider = Provider(pages=16, capacity=4)
    registration = provider.inode.register(RecordingUser())
    with pytest.raises(Refusal) as caught:
        provider.run(provider.inode.fallocate(1, 0, 16 * PAGE_SIZE))
    assert (caught.value.errno, caught.value.rule) == (errno.ENOMEM, "pool.empty")
    for index in range(4):
        provider.run(provider.fault(registration, index, Access.PRIVATE))
    with pytest.raises(Refusal) as caught:
        provider.run(provider.fault(registration, 9, Access.PRIVATE))
    assert caught.value.errno == errno.ENOMEM
    provider.inode.check()
    provider.close()


# Poison and size


def test_poison_is_refused_until_punched_and_never_given_out_again(provider: Provider) -> None:
    registration = provider.inode.register(RecordingUser())
    page = provider.run(provider.fault(registration, 1, Access.PRIVATE))
    assert provider.run(provider.inode.memory_failure(PageIndex(1))) is True
    assert provider.run(provider.inode.memory_failure(PageIndex(2))) is False
    for _ in range(2):
        with pytest.raises(Refusal) as caught:
            provider.run(provider.fault(registration, 1, Access.PRIVATE))
        assert (caught.value.errno, caught.value.rule) == (EHWPOISON, "fault.poisoned")
    assert not provider.inode.folios.references, "known bug B05: the reference of the refused fault"
    provider.run(provider.inode.punch_hole(pages(1, 2)))
    fresh = provider.run(provider.fault(registration, 1, Access.PRIVATE))
    assert fresh.pfn != page.pfn
    assert provider.pool.statistics().retired == 1


def test_the_largest_file_costs_nothing() -> None:
    size = 0x7FFF_FFFF_FFFF_F000
    provider = Provider(pages=size // PAGE_SIZE)
    registration = provider.inode.register(RecordingUser())
    last = size // PAGE_SIZE - 1
    page = provider.run(provider.fault(registration, last, Access.PRIVATE))
    write_host(page.hva, b"end")
    provider.convert(0, last + 1, Access.SHARED)
    assert read_host(provider.run(provider.fault(registration, last, Access.SHARED)).hva, 3) == b"end"
    provider.run(provider.inode.fallocate(3, 0, size))
    assert provider.inode.statistics().allocated == 0
    provider.close()
