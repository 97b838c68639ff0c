"""A pass, and how it ends."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from guestmem.cpu import uc_native
from guestmem.cpu.registers import Regs
from guestmem.cpu.uc_core import HOOK_TLB_FILL, Core, Signal


@pytest.fixture
def core() -> Iterator[Core]:
    core = Core()
    core.hook(HOOK_TLB_FILL, uc_native.NOTHING)
    yield core
    core.close()


def test_a_refused_fill_leaves_its_address(core: Core) -> None:
    core.cpu.set_regs(Regs(rip=0x1234_5678_9ABC))
    assert core.emulate() == uc_native.ERR_EXCEPTION
    assert core.fault_address == 0x1234_5678_9ABC
    assert core.cpu.get_regs().rip == 0x1234_5678_9ABC


def test_what_a_hook_raises_is_raised_by_the_pass(core: Core) -> None:
    def fails(*_arguments: object) -> bool:
        raise KeyError("from the hook")

    other = Core()
    other.hook(HOOK_TLB_FILL, uc_native.FillHook(other.guard(fails, False)))
    other.cpu.set_regs(Regs(rip=0x1000))
    for _ in range(2):
        with pytest.raises(KeyError, match="from the hook"):
            other.emulate()
    other.close()


def test_the_first_cause_wins(core: Core) -> None:
    core.stop(Signal.SYSCALL)
    core.stop(Signal.SYSENTER)
    assert core.cause is Signal.SYSCALL


def test_nothing_happens_in_a_sealed_pass(core: Core) -> None:
    core.cpu.set_regs(Regs(rip=0x1234_5000, rax=1, rflags=0x246))
    core.sealed_pass()
    assert core.cpu.get_regs() == Regs(rip=0x1234_5000, rax=1, rflags=0x246)
    assert not core.sealed


def test_the_end_of_a_slice_and_a_step(core: Core) -> None:
    """A step is not interrupted: a stop in it would come between a store and the end of its instruction."""
    core.stepping = True
    core.end_slice()
    assert core.slice_over
    core.stepping = False
    core.close()
    core.end_slice()


def test_close_is_idempotent() -> None:
    core = Core()
    core.hook(HOOK_TLB_FILL, uc_native.NOTHING)
    core.close()
    core.close()
    assert not core._finalizer.alive
