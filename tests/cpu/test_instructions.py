"""CPUID, SYSCALL and INT3, by guests that execute them."""

from __future__ import annotations

import pytest

from guestmem.cpu.engine import Halt, PortOut, Shutdown
from guestmem.cpu.unicorn import UnicornEngine
from tests.cpu.guests import CODE, STACK, Memory, assemble, run, start_long

HLT = b"\xf4"
IDT, HANDLER = 0x20000, 0x9000


def test_cpuid(engine: UnicornEngine, memory: Memory) -> None:
    code = b"\xb8\x00\x00\x00\x40\x0f\xa2" + HLT  # mov eax, 0x40000000; cpuid; hlt
    start_long(engine, memory, code)
    assert run(engine) == Halt()
    regs = engine.get_regs()
    assert regs.rax == 0x4000_0001
    assert b"".join(word.to_bytes(4, "little") for word in (regs.rbx, regs.rcx, regs.rdx)) == b"KVMKVMKVM\0\0\0"
    engine.set_cpuid({(0x4000_0000, 0): (1, 2, 3, 4)})
    regs.rip, regs.rcx = CODE, 77
    engine.set_regs(regs)
    assert run(engine) == Halt()
    regs = engine.get_regs()
    assert (regs.rax, regs.rbx, regs.rcx, regs.rdx) == (1, 2, 3, 4)


def test_amd64_syscall_and_back(engine: UnicornEngine, memory: Memory) -> None:
    """Ring 3 by SYSRET, and ring 0 again by SYSCALL, which Unicorn leaves out."""
    code = assemble(
        """
        mov ecx, 0xC0000081; xor eax, eax; mov edx, 0x00180008; wrmsr
        mov ecx, 0xC0000082; lea eax, [entry]; xor edx, edx; wrmsr
        mov ecx, 0xC0000084; mov eax, 0x200; xor edx, edx; wrmsr
        mov ecx, 0xC0000080; mov eax, 0xD01; xor edx, edx; wrmsr
        lea rcx, [user]
        mov r11d, 0x202
        sysretq
    user:
        mov eax, 0x77
        syscall
        hlt
    entry:
        out 0x80, al
        """
    )
    start_long(engine, memory, code)
    assert run(engine) == PortOut(0x80, 1, 0x77)
    regs, sregs = engine.get_regs(), engine.get_sregs()
    assert regs.rcx == CODE + code.index(b"\x0f\x05") + 2
    assert (regs.r11, regs.rflags) == (0x202, 2)
    assert (sregs.cs.selector, sregs.cs.dpl, sregs.ss.selector, sregs.ss.dpl) == (8, 0, 16, 0)


@pytest.mark.parametrize("code", [b"\xcc", b"\xcd\x03"], ids=["int3", "int 3"])
def test_fault_of_an_int_is_at_the_int(engine: UnicornEngine, memory: Memory, code: bytes) -> None:
    """Its gate is not there: #GP with the gate's number, and the frame has RIP of the INT."""
    start_long(engine, memory, code)
    memory.write(HANDLER, b"\xf4")
    memory.write(IDT + 13 * 16, (HANDLER | 8 << 16 | 0x8E << 40).to_bytes(16, "little"))
    sregs = engine.get_sregs()
    sregs.idt.base, sregs.idt.limit = IDT, 0xFFF
    engine.set_sregs(sregs)
    assert run(engine) == Halt()
    assert (memory.word(STACK - 48), memory.word(STACK - 40)) == (3 * 8 + 2, CODE)


@pytest.mark.parametrize(("code", "length"), [(b"\xcc", 1), (b"\xcd\x03", 2)], ids=["int3", "int 3"])
def test_int_without_an_idt(engine: UnicornEngine, memory: Memory, code: bytes, length: int) -> None:
    """A triple fault; RIP of the state stays past the instruction that is complete."""
    start_long(engine, memory, code)
    assert run(engine) == Shutdown()
    assert engine.get_regs().rip == CODE + length
