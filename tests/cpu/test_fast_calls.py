"""SYSCALL and SYSENTER, by the numbers; test_unicorn has a guest that goes there and back."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from guestmem.cpu import fast_calls
from guestmem.cpu.engine import PortOut
from guestmem.cpu.fast_calls import syscall, sysenter
from guestmem.cpu.guest_memory import GuestFault
from guestmem.cpu.registers import Regs, Segment, Sregs
from guestmem.cpu.unicorn import UnicornEngine
from tests.cpu.guests import CODE, Memory, assemble, run, start_long

STAR = 0x0018_0008 << 32


def msrs(**values: int) -> Callable[[int], int]:
    """RDMSR that knows these, by the end of their names."""
    table = {getattr(fast_calls, f"MSR_{name.upper()}"): value for name, value in values.items()}
    return table.__getitem__


def test_syscall() -> None:
    regs, sregs = Regs(rip=0x1002, rcx=1, r11=2, rflags=0x10346), Sregs(efer=0x501, cr0=1)
    sregs.cs.l = 1
    syscall(regs, sregs, msrs(star=STAR, lstar=0xFFFF_8000_0000_0000, fmask=0x300))
    assert (regs.rip, regs.rcx, regs.r11, regs.rflags) == (0xFFFF_8000_0000_0000, 0x1002, 0x10346, 0x46)
    assert sregs.cs == Segment(0, 0xFFFF_FFFF, 8, type=11, l=1, g=1)
    assert sregs.ss == Segment(0, 0xFFFF_FFFF, 16, type=3, db=1, g=1)


def test_syscall_of_32_bit_code_goes_to_cstar() -> None:
    regs, sregs = Regs(rip=0x1002), Sregs(efer=0x501, cr0=1)
    syscall(regs, sregs, msrs(star=STAR, cstar=0x2000, fmask=0))
    assert regs.rip == 0x2000


def test_sysenter() -> None:
    regs, sregs = Regs(rip=0x1002, rflags=0x20202), Sregs(cr0=1)
    sysenter(regs, sregs, msrs(sysenter_cs=0x0B, sysenter_esp=0x1_0000_8000, sysenter_eip=0x1_0000_9000))
    assert (regs.rip, regs.rsp, regs.rflags) == (0x9000, 0x8000, 2)
    assert sregs.cs == Segment(0, 0xFFFF_FFFF, 8, type=11, db=1, g=1)
    assert sregs.ss.selector == 16


@pytest.mark.parametrize("efer", [0x500, 0x001])
def test_syscall_that_is_not_enabled(efer: int) -> None:
    with pytest.raises(GuestFault) as fault:
        syscall(Regs(), Sregs(efer=efer, cr0=1), msrs())
    assert fault.value.vector == 6


@pytest.mark.parametrize(("cr0", "cs"), [(0, 8), (1, 3)])
def test_sysenter_that_is_not_set_up(cr0: int, cs: int) -> None:
    with pytest.raises(GuestFault) as fault:
        sysenter(Regs(), Sregs(cr0=cr0), msrs(sysenter_cs=cs))
    assert (fault.value.vector, fault.value.error_code) == (13, 0)


def test_guest_uses_sysenter(engine: UnicornEngine, memory: Memory) -> None:
    """In 32-bit code; in 64-bit code it is an invalid instruction, as on AMD."""
    code = assemble(
        """
        mov ecx, 0x174; mov eax, 8; xor edx, edx; wrmsr
        mov ecx, 0x175; mov eax, 0x7000; wrmsr
        mov ecx, 0x176; lea eax, [entry]; wrmsr
        sysenter
        hlt
    entry:
        push eax
        out 0x80, al
        """,
        bits=32,
    )
    memory.write(CODE, code)
    sregs = Sregs(cr0=0x11)
    sregs.cs = Segment(0, 0xFFFF_FFFF, 8, type=11, db=1, g=1)
    sregs.ss = sregs.ds = Segment(0, 0xFFFF_FFFF, 16, type=3, db=1, g=1)
    engine.set_sregs(sregs)
    engine.set_regs(Regs(rip=CODE))
    entry = CODE + code.index(b"\x50\xe6\x80")
    assert run(engine) == PortOut(0x80, 1, entry & 0xFF)
    assert engine.get_regs().rsp == 0x7000 - 4
    assert memory.word(0x7000 - 4, 4) == entry


def test_the_fault_is_at_the_instruction(engine: UnicornEngine, memory: Memory) -> None:
    start_long(engine, memory, b"\x90\x0f\x05")
    memory.write(0x20000 + 6 * 16, (0x9000 | 8 << 16 | 0x8E << 40).to_bytes(16, "little"))
    memory.write(0x9000, b"\xe6\x80")
    sregs = engine.get_sregs()
    sregs.idt.base, sregs.idt.limit = 0x20000, 0xFFF
    engine.set_sregs(sregs)
    assert run(engine) == PortOut(0x80, 1, 0)
    assert memory.word(engine.get_regs().rsp) == CODE + 1
