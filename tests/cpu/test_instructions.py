"""Hypercalls, CPUID, SYSCALL and INT3, by guests that execute them."""

from __future__ import annotations

import pytest

from guestmem.cpu.engine import Halt, Hypercall, PortOut, Shutdown
from guestmem.cpu.unicorn import UnicornEngine
from tests.cpu.guests import CODE, PAGE, Memory, assemble, run, start_long, start_real

HLT = b"\xf4"
VMCALL, VMMCALL = b"\x0f\x01\xc1", b"\x0f\x01\xd9"


@pytest.mark.parametrize("instruction", [VMCALL, VMMCALL])
def test_hypercall(engine: UnicornEngine, memory: Memory, instruction: bytes) -> None:
    start_long(engine, memory, instruction + HLT)
    regs = engine.get_regs()
    regs.rax, regs.rbx, regs.rcx, regs.rdx, regs.rsi = 12, 1 << 63, 3, 4, 5
    engine.set_regs(regs)
    assert run(engine) == Hypercall(12, (1 << 63, 3, 4, 5), cpl=0)
    assert engine.get_regs().rip == CODE + 3
    engine.complete((1 << 64) - 1000)
    assert run(engine) == Halt()
    after = engine.get_regs()
    assert (after.rax, after.rbx, after.rip) == ((1 << 64) - 1000, 1 << 63, CODE + 4)


def test_hypercall_outside_of_64_bit_code_is_cut_to_32(engine: UnicornEngine, memory: Memory) -> None:
    start_real(engine, memory, VMCALL + HLT)
    regs = engine.get_regs()
    regs.rax, regs.rsi = 0xFFFF_FFFF_0000_0001, 1 << 40
    engine.set_regs(regs)
    assert run(engine) == Hypercall(1, (0, 0, 0, 0))
    engine.complete(-1)
    assert engine.get_regs().rax == 0xFFFF_FFFF


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


def test_hypercall_from_ring_3_says_so(engine: UnicornEngine, memory: Memory) -> None:
    start_long(engine, memory, VMMCALL)
    sregs = engine.get_sregs()
    sregs.cs.dpl = sregs.ss.dpl = 3
    engine.set_sregs(sregs)
    assert run(engine) == Hypercall(0, (0, 0, 0, 0), cpl=3)


def test_hypercall_across_two_pages(engine: UnicornEngine, memory: Memory) -> None:
    start_long(engine, memory, VMCALL + HLT, 2 * PAGE - 1)
    assert run(engine) == Hypercall(0, (0, 0, 0, 0))
    assert engine.get_regs().rip == 2 * PAGE + 2
    assert run(engine) == Halt()


@pytest.mark.parametrize(("code", "length"), [(b"\xcc", 1), (b"\xcd\x03", 2)], ids=["int3", "int 3"])
def test_fault_of_an_int_is_at_the_int(engine: UnicornEngine, memory: Memory, code: bytes, length: int) -> None:
    """Without an IDT the delivery faults thrice; RIP of the state stays past the instruction that is complete."""
    start_long(engine, memory, code)
    assert engine._vcpu.instructions.linear_rip() == CODE
    assert run(engine) == Shutdown()
    assert engine.get_regs().rip == CODE + length
    assert engine._vcpu.instructions.int_length(3) == length
