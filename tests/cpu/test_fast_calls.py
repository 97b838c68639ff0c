"""SYSCALL and SYSENTER: what they leave, by guests that use them; test_unicorn has one that goes there and back."""

from __future__ import annotations

import pytest

from guestmem.cpu import msrs
from guestmem.cpu.engine import PortOut, Stage2Miss
from guestmem.cpu.registers import Regs, Segment, Sregs
from guestmem.cpu.unicorn import UnicornEngine
from tests.cpu.guests import CODE, PAGE, Memory, assemble, run, start_long

STAR = 0x0018_0008 << 32
ENTRY = 0x9000
SYSCALL, SYSENTER = b"\x0f\x05", b"\x0f\x34"


def enter(engine: UnicornEngine, memory: Memory, **values: int) -> None:
    """Run up to the first instruction of the entry, which stage 2 does not hold."""
    for name, value in values.items():
        assert engine.set_msr(getattr(msrs, name.upper()), value)
    memory.denied.add(ENTRY // PAGE)
    assert run(engine) == Stage2Miss(ENTRY, fetch=True)


def flat(engine: UnicornEngine, memory: Memory, code: bytes, **sregs: int) -> None:
    """32-bit code without paging."""
    memory.write(CODE, code)
    state = Sregs(**{"cr0": 0x11, **sregs})  # type: ignore[arg-type]
    state.cs = Segment(0, 0xFFFF_FFFF, 8, type=11, db=1, g=1)
    state.ss = state.ds = Segment(0, 0xFFFF_FFFF, 16, type=3, db=1, g=1)
    engine.set_sregs(state)
    engine.set_regs(Regs(rip=CODE, rsp=0x8000, rflags=0x302))


def test_syscall(engine: UnicornEngine, memory: Memory) -> None:
    start_long(engine, memory, SYSCALL)
    regs = engine.get_regs()
    regs.rflags, regs.rcx, regs.r11 = 0x246, 1, 2
    engine.set_regs(regs)
    enter(engine, memory, efer=0x501, star=STAR, lstar=ENTRY, fmask=0x300)
    regs, sregs = engine.get_regs(), engine.get_sregs()
    assert (regs.rip, regs.rcx, regs.r11, regs.rflags) == (ENTRY, CODE + 2, 0x246, 0x46)
    assert sregs.cs == Segment(0, 0xFFFF_FFFF, 8, type=11, l=1, g=1)
    assert sregs.ss == Segment(0, 0xFFFF_FFFF, 16, type=3, db=1, g=1)


def test_syscall_of_32_bit_code_goes_to_cstar(engine: UnicornEngine, memory: Memory) -> None:
    start_long(engine, memory, SYSCALL)
    sregs = engine.get_sregs()
    sregs.cs.l, sregs.cs.db = 0, 1
    engine.set_sregs(sregs)
    enter(engine, memory, efer=0x501, star=STAR, cstar=ENTRY, lstar=0x7000, fmask=0)
    assert engine.get_regs().rip == ENTRY


def test_sysenter(engine: UnicornEngine, memory: Memory) -> None:
    flat(engine, memory, SYSENTER)
    enter(engine, memory, sysenter_cs=0x0B, sysenter_esp=0x1_0000_8000, sysenter_eip=0x1_0000_0000 + ENTRY)
    regs, sregs = engine.get_regs(), engine.get_sregs()
    assert (regs.rip, regs.rsp, regs.rflags) == (ENTRY, 0x8000, 0x102)
    assert sregs.cs == Segment(0, 0xFFFF_FFFF, 8, type=11, db=1, g=1)
    assert sregs.ss.selector == 16


def raises(engine: UnicornEngine, memory: Memory, vector: int, error_code: int | None) -> None:
    """The exception is seen where its delivery misses the IDT."""
    sregs = engine.get_sregs()
    sregs.idt.base, sregs.idt.limit = 0x6000, 0xFFF
    engine.set_sregs(sregs)
    memory.denied.add(6)
    assert isinstance(run(engine), Stage2Miss)
    events = engine.get_events()
    assert (events.exception_injected, events.exception_nr, events.exception_error_code) == (True, vector, error_code)
    assert engine.get_regs().rip == CODE


def test_syscall_that_is_not_enabled(engine: UnicornEngine, memory: Memory) -> None:
    start_long(engine, memory, SYSCALL)
    raises(engine, memory, 6, None)


def test_syscall_outside_of_long_mode(engine: UnicornEngine, memory: Memory) -> None:
    flat(engine, memory, SYSCALL, efer=1)
    raises(engine, memory, 6, None)


@pytest.mark.parametrize("cs", [0, 3])
def test_sysenter_that_is_not_set_up(engine: UnicornEngine, memory: Memory, cs: int) -> None:
    flat(engine, memory, SYSENTER)
    assert engine.set_msr(msrs.SYSENTER_CS, cs)
    raises(engine, memory, 13, 0)


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
