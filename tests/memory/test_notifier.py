"""Who is told what, when; registration and its end."""

from __future__ import annotations

import pytest

from guestmem.memory import Access, Invalidation, Range, Reason, Window
from guestmem.memory.notifier import BOTH
from tests.explore import Follow, every_schedule
from tests.memory.conftest import Provider, RecordingUser, pages


def reasons(user: RecordingUser) -> list[tuple[str, Reason, tuple[Access, ...]]]:
    return [(step, seen.reason, seen.accesses) for step, seen in user.told]


def test_every_event_is_told_with_its_reason_and_the_old_access(provider: Provider) -> None:
    user = RecordingUser()
    registration = provider.inode.register(user)
    provider.convert(0, 4, Access.SHARED)
    provider.convert(1, 2, Access.PRIVATE)
    provider.run(provider.fault(registration, 0, Access.SHARED))
    provider.run(provider.inode.memory_failure(pages(0, 1).start))
    provider.run(provider.inode.punch_hole(pages(0, 1)))
    provider.run(provider.inode.put())
    expected = [
        (Reason.CONVERT_TO_SHARED, (Access.PRIVATE,)),
        (Reason.CONVERT_TO_PRIVATE, (Access.SHARED,)),
        (Reason.POISON, BOTH),
        (Reason.TRUNCATE, BOTH),
        (Reason.RELEASE, BOTH),
    ]
    assert reasons(user) == [(step, *seen) for seen in expected for step in ("begin", "end")]


def test_nobody_is_told_of_a_conversion_that_changes_nothing(provider: Provider) -> None:
    user = RecordingUser()
    provider.inode.register(user)
    provider.convert(0, 16, Access.PRIVATE)
    assert not user.told


def test_the_state_changes_between_begin_and_end(provider: Provider) -> None:
    seen: list[Access] = []
    user = RecordingUser(on_begin=lambda invalidation: seen.append(provider.inode.access_at(invalidation.pages.start)))
    provider.inode.register(user)
    provider.convert(3, 4, Access.SHARED)
    assert seen == [Access.PRIVATE]
    assert provider.inode.access_at(pages(3, 4).start) is Access.SHARED


def test_users_that_take_references_are_told_before_references_are_looked_at(provider: Provider) -> None:
    order: list[str] = []
    quiet = RecordingUser("quiet", on_begin=lambda invalidation: order.append("quiet"))
    pinning = RecordingUser("pinning", takes_references=True, on_begin=lambda invalidation: order.append("pinning"))
    provider.inode.register(quiet)
    provider.inode.register(pinning)
    provider.convert(0, 1, Access.SHARED)
    assert order == ["quiet", "pinning"]
    order.clear()
    provider.convert(0, 1, Access.PRIVATE)
    assert order == ["pinning", "quiet"]


def test_an_unregistered_user_hears_nothing(provider: Provider) -> None:
    user = RecordingUser()
    registration = provider.inode.register(user)
    provider.run(registration.unregister())
    provider.convert(0, 1, Access.SHARED)
    assert not user.told


def test_unregistering_waits_for_the_call_in_flight_in_every_schedule() -> None:
    """S20, L6: when unregister returns, no begin or end is running or to come; and it does return."""

    def scenario(policy: Follow) -> None:
        provider = Provider(pages=2, policy=policy)
        user = RecordingUser()
        registration = provider.inode.register(user)
        gone = [False]

        async def begin(invalidation: Invalidation) -> None:
            assert not gone[0], "told after unregister returned"
            user.told.append(("begin", invalidation))
            await provider.scheduler.preempt("inside begin")
            assert not gone[0], "unregister returned during a call"

        async def end(invalidation: Invalidation) -> None:
            assert not gone[0], "told after unregister returned"
            user.told.append(("end", invalidation))

        user.invalidate_begin = begin  # type: ignore[method-assign]
        user.invalidate_end = end  # type: ignore[method-assign]

        async def leave() -> None:
            await registration.unregister()
            gone[0] = True

        tasks = [
            provider.scheduler.spawn(provider.inode.convert(pages(0, 1), Access.SHARED), "convert"),
            provider.scheduler.spawn(leave(), "leave"),
        ]
        provider.scheduler.drain()
        for task in tasks:
            task.outcome()
        steps = [step for step, _ in user.told]
        assert steps in ([], ["begin", "end"])
        provider.close()

    assert every_schedule(scenario) > 5


def test_window_blocks_what_was_looked_up_before_it_closed() -> None:
    window: Window[int] = Window("seq")
    seen = window.sequence.read()
    assert not window.blocks(seen, Range(5, 6))
    window.begin(Range(4, 6))
    assert window.blocks(window.sequence.read(), Range(5, 6))
    assert not window.blocks(window.sequence.read(), Range(6, 7))
    window.end()
    assert window.blocks(seen, Range(5, 6)), "the look-up is older than the window"
    assert not window.blocks(window.sequence.read(), Range(5, 6))


def test_windows_nest_over_their_hull_and_pair_up() -> None:
    window: Window[int] = Window("seq")
    window.begin(Range(0, 1))
    window.begin(Range(8, 9))
    assert window.blocks(window.sequence.read(), Range(4, 5)), "the hull, as in the kernel"
    window.end()
    assert window.blocks(window.sequence.read(), Range(0, 1))
    window.end()
    assert not window.blocks(window.sequence.read(), Range(0, 1))
    with pytest.raises(AssertionError, match="S4"):
        window.end()
