"""A pass, its hooks, and the copy of the registers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from unicorn import unicorn_const

from guestmem.cpu import uc_native
from guestmem.cpu.registers import Regs
from guestmem.cpu.uc_core import HOOK_BLOCK, Core, Signal


@pytest.fixture
def core() -> Iterator[Core]:
    core = Core()
    core.hook(unicorn_const.UC_HOOK_TLB_FILL, uc_native.NOTHING)
    yield core
    core.close()


def test_a_refused_fill_leaves_its_address(core: Core) -> None:
    core.modify().set_regs(Regs(rip=0x1234_5678_9ABC))
    assert core.emulate() == uc_native.ERR_EXCEPTION
    assert core.fault_address == 0x1234_5678_9ABC
    assert core.sync().get_regs().rip == 0x1234_5678_9ABC


def test_what_a_hook_raises_is_raised_by_the_pass(core: Core) -> None:
    def fails(*_arguments: object) -> bool:
        raise KeyError("from the hook")

    other = Core()
    other.hook(unicorn_const.UC_HOOK_TLB_FILL, uc_native.FillHook(other.guard(fails, False)))
    other.modify().set_regs(Regs(rip=0x1000))
    for _ in range(2):
        with pytest.raises(KeyError, match="from the hook"):
            other.emulate()
    other.close()


def test_the_first_cause_wins(core: Core) -> None:
    core.stop(Signal.STEPPED)
    core.stop(Signal.SLICE_OVER)
    assert core.cause is Signal.STEPPED


def test_a_copy_that_is_newer_goes_into_the_pass(core: Core) -> None:
    core.modify().set_regs(Regs(rip=0x1000, rax=1))
    core.emulate()
    core.sync().env.regs[0] = 2
    core.emulate()
    assert core.sync().get_regs().rax == 1, "not marked as modified"
    core.modify().env.regs[0] = 3
    core.emulate()
    assert core.sync().get_regs().rax == 3
    core.state.env.regs[0] = 4
    core.roll_back()
    core.emulate()
    assert core.sync().get_regs().rax == 4


def test_instruction_pointer_of_the_copy_counts_unmarked(core: Core) -> None:
    core.modify().set_regs(Regs(rip=0x1000))
    core.emulate()
    core.sync().env.eip = 0x2000
    core.emulate()
    assert core.fault_address == 0x2000


def test_close_is_idempotent() -> None:
    core = Core()
    core.hook(HOOK_BLOCK, uc_native.NOTHING)
    core.close()
    core.close()
    assert not core._finalizer.alive
