"""What a guest finds after an instruction that KVM has answered: registers, flags, or an exception."""

from __future__ import annotations

import pytest

from guestmem.cpu.engine import (
    Halt,
    PageBit,
    PortOut,
    Pvalidate,
    Rmpadjust,
    Stage2Miss,
    Tdcall,
    Vmgexit,
)
from tests.cpu.guests import CODE, DATA, DB, GP, PAGE, VC
from tests.cpu.protected_guest import (
    C_BIT,
    HLT,
    PVALIDATE,
    RMPADJUST,
    SHARED_BIT,
    TDCALL,
    VMGEXIT,
    VMMCALL,
    Start,
)

CARRY, PARITY, AUXILIARY, ZERO, SIGN, OVERFLOW = 1 << 0, 1 << 2, 1 << 4, 1 << 6, 1 << 7, 1 << 11
STATUS_FLAGS = CARRY | PARITY | AUXILIARY | ZERO | SIGN | OVERFLOW


def flags_of(status: int) -> int:
    """As TEST EAX, EAX: the manual says only that the flags are set by the return code."""
    return {0: ZERO | PARITY, 1: 0, 2: 0, 3: PARITY, 6: PARITY}[status]


class TestResults:
    @pytest.mark.parametrize("status", [0, 1, 2, 3, 6])
    @pytest.mark.parametrize("carry", [0, 1])
    @pytest.mark.parametrize("before", [0, STATUS_FLAGS])
    def test_pvalidate(self, start: Start, status: int, carry: int, before: int) -> None:
        """EAX with the upper half of RAX zero, CF, and the flags by the code. Source: APM3, PVALIDATE."""
        guest = start(C_BIT, PVALIDATE, rax=0xFFFF_8000_0000_0000, rcx=0, rdx=1, rflags=2 | before)
        guest.set(rax=DATA)
        assert isinstance(guest.run(), Pvalidate)
        guest.engine.complete(status | carry << 32)
        regs = guest.engine.get_regs()
        assert (regs.rip, regs.rax, regs.rdx) == (CODE + 4, status, 1)
        assert regs.rflags == 2 | flags_of(status) | carry
        assert guest.run() == Halt()

    @pytest.mark.parametrize("status", [0, 1, 2, 3, 6])
    @pytest.mark.parametrize("before", [0, STATUS_FLAGS])
    def test_rmpadjust(self, start: Start, status: int, before: int) -> None:
        """EAX and the flags by the code; CF stays. Source: APM3, RMPADJUST."""
        guest = start(C_BIT, RMPADJUST, rax=DATA, rdx=0xF01, rflags=2 | before)
        assert isinstance(guest.run(), Rmpadjust)
        guest.engine.complete(status)
        regs = guest.engine.get_regs()
        assert (regs.rip, regs.rax) == (CODE + 4, status)
        assert regs.rflags == 2 | flags_of(status) | before & CARRY

    def test_the_guest_sees_the_carry(self, start: Start) -> None:
        """As Linux does it: setc, and EAX. Source: arch/x86/include/asm/sev.h pvalidate()."""
        guest = start(C_BIT, PVALIDATE + b"\x0f\x92\xc3", rax=DATA)  # setc bl
        guest.run()
        guest.engine.complete(1 << 32)
        assert guest.run() == Halt()
        assert guest.engine.get_regs().rbx & 0xFF == 1

    def test_run_without_a_result_asks_again(self, start: Start) -> None:
        guest = start(C_BIT, PVALIDATE, rax=DATA)
        assert guest.run() == guest.run() == Pvalidate(DATA, False, False)

    def test_a_result_for_what_the_vmm_has_left_is_dropped(self, start: Start) -> None:
        guest = start(C_BIT, PVALIDATE + HLT, rax=DATA)
        guest.run()
        guest.set(rip=CODE + 4)
        guest.engine.complete(1)
        assert guest.engine.get_regs().rax == DATA

    def test_tdcall(self, start: Start) -> None:
        """RAX whole, other registers as they were set before."""
        guest = start(SHARED_BIT, TDCALL, rax=1)
        assert guest.run() == Tdcall(1)
        guest.set(rcx=48, r8=5)
        guest.engine.complete(0xC000_0100_0000_0001)
        assert guest.run() == Halt()
        regs = guest.engine.get_regs()
        assert (regs.rax, regs.rcx, regs.r8) == (0xC000_0100_0000_0001, 48, 5)

    @pytest.mark.parametrize(
        ("bit", "code"), [(C_BIT, PVALIDATE), (C_BIT, RMPADJUST), (C_BIT, VMGEXIT), (SHARED_BIT, TDCALL)]
    )
    def test_single_step(self, start: Start, bit: PageBit, code: bytes) -> None:
        """With RFLAGS.TF #DB follows the instruction, and not before it has its result."""
        guest = start(bit, code, rax=DATA, rflags=0x102)
        stop = guest.run()
        assert isinstance(stop, (Pvalidate, Rmpadjust, Vmgexit, Tdcall))
        guest.engine.complete(0)
        assert guest.run() == PortOut(DB, 1, DB)
        assert guest.memory.word(guest.engine.get_regs().rsp) == CODE + 4


class TestExceptions:
    @pytest.mark.parametrize(
        ("bit", "code"),
        [(C_BIT, PVALIDATE), (C_BIT, RMPADJUST), (C_BIT, VMGEXIT), (C_BIT, VMMCALL), (SHARED_BIT, TDCALL)],
    )
    @pytest.mark.parametrize(("vector", "error"), [(GP, 0), (VC, 0x404)])
    def test_raised_at_the_instruction(self, start: Start, bit: PageBit, code: bytes, vector: int, error: int) -> None:
        """Once; the result that comes after it is nobody's."""
        guest = start(bit, code, rax=DATA)
        assert not isinstance(guest.run(), PortOut)
        guest.engine.raise_exception(vector, error)
        guest.engine.complete(77)
        assert guest.exception() == (vector, error)
        assert guest.engine.get_regs().rax & 0xFF == vector

    def test_vc_in_place_of_an_access(self, start: Start) -> None:
        """A page that is not validated: error code 0x404 of #VC (29). Source: Linux SVM_EXIT codes, sev-common.h."""
        guest = start(C_BIT, b"\x8a\x07", rdi=DATA)  # mov al, [rdi]
        guest.memory.denied.add(DATA // PAGE)
        assert guest.run() == Stage2Miss(DATA, private=True)
        guest.engine.raise_exception(VC, 0x404)
        assert guest.exception() == (VC, 0x404)

    def test_vc_sets_the_resume_flag_in_its_frame(self, start: Start) -> None:
        """It is a fault. Source: APM volume 2, 15.35.5."""
        guest = start(C_BIT, PVALIDATE, rax=DATA)
        guest.run()
        guest.engine.raise_exception(VC, 0x404)
        guest.run()
        assert guest.memory.word(guest.engine.get_regs().rsp + 24) >> 16 & 1
