"""What KVM_SET_GUEST_DEBUG asks of the CPU.

Source: Documentation/virt/kvm/api.rst, Intel SDM vol. 3, 19.2.
"""

from __future__ import annotations

import dataclasses

import pytest

from guestmem.cpu.engine import Debug, Halt, MmioRead, PortOut, Stage2Miss
from guestmem.cpu.unicorn import UnicornEngine
from tests.cpu.guests import CODE, DATA, PAGE, STACK, Memory, run, start_long

ENABLE, STEP, SW_BP, HW_BP, BLOCK_IRQ = 1, 2, 1 << 16, 1 << 17, 1 << 20
DR6, DR7 = 0xFFFF_0FF0, 0x400
BS = DR6 | 1 << 14
IDT, HANDLER = 0x20000, 0x9000
NOP, HLT, INT3, UD2 = b"\x90", b"\xf4", b"\xcc", b"\x0f\x0b"


def start(engine: UnicornEngine, memory: Memory, code: bytes, **registers: int) -> None:
    """Every vector has the same handler: IRETQ."""
    start_long(engine, memory, code)
    memory.write(HANDLER, b"\x48\xcf")
    for vector in range(256):
        memory.write(IDT + vector * 16, (HANDLER | 8 << 16 | 0x8E << 40).to_bytes(16, "little"))
    sregs = engine.get_sregs()
    sregs.idt.base, sregs.idt.limit = IDT, 0xFFF
    sregs.gdt.base, sregs.gdt.limit = DATA, 0x1F
    memory.set_word(DATA + 8, 0x00AF_9B00_0000_FFFF)
    memory.set_word(DATA + 16, 0x00CF_9300_0000_FFFF)
    engine.set_sregs(sregs)
    regs = dataclasses.replace(engine.get_regs(), **registers)
    engine.set_regs(regs)


def at(rip: int, dr6: int = BS) -> Debug:
    return Debug(1, rip, dr6, DR7)


def test_every_instruction_is_a_stop(engine: UnicornEngine, memory: Memory) -> None:
    start(engine, memory, b"\x90\x90\x83\xc0\x01" + HLT)  # nop; nop; add eax, 1
    engine.set_guest_debug(ENABLE | STEP)
    assert [run(engine) for _ in range(4)] == [at(CODE + 1), at(CODE + 2), at(CODE + 5), Halt()]
    assert (engine.get_regs().rax, engine.get_regs().rflags) == (1, 2)


def test_without_enable_there_is_no_stop(engine: UnicornEngine, memory: Memory) -> None:
    start(engine, memory, NOP + HLT)
    engine.set_guest_debug(STEP)
    assert run(engine) == Halt()


def test_each_iteration_of_a_rep_is_a_step(engine: UnicornEngine, memory: Memory) -> None:
    start(engine, memory, b"\xf3\xaa" + HLT, rcx=2, rdi=DATA + 0x100)  # rep stosb
    engine.set_guest_debug(ENABLE | STEP)
    first = run(engine)
    assert (first, engine.get_regs().rcx) == (at(CODE), 1)
    assert isinstance(run(engine), Debug)
    assert engine.get_regs().rcx == 0


def test_a_step_into_a_handler(engine: UnicornEngine, memory: Memory) -> None:
    start(engine, memory, UD2)
    engine.set_guest_debug(ENABLE | STEP)
    assert run(engine) == at(HANDLER)
    assert memory.word(STACK - 40) == CODE
    assert run(engine) == at(CODE)


def test_an_interrupt_while_stepping(engine: UnicornEngine, memory: Memory) -> None:
    """sti; nop; nop: taken behind the shadow, as a step of its own."""
    start(engine, memory, b"\xfb\x90\x90" + HLT)
    engine.set_guest_debug(ENABLE | STEP)
    engine.queue_interrupt(0x40)
    assert [run(engine) for _ in range(5)] == [at(CODE + 1), at(CODE + 2), at(HANDLER), at(CODE + 2), at(CODE + 3)]


def test_interrupts_are_blocked(engine: UnicornEngine, memory: Memory) -> None:
    start(engine, memory, NOP + NOP + HLT, rflags=0x202)
    engine.set_guest_debug(ENABLE | STEP | BLOCK_IRQ)
    engine.queue_interrupt(0x40)
    assert [run(engine) for _ in range(2)] == [at(CODE + 1), at(CODE + 2)]
    engine.set_guest_debug(ENABLE | STEP)
    assert run(engine) == at(HANDLER)


def test_misses_are_no_steps(engine: UnicornEngine, memory: Memory) -> None:
    start(engine, memory, b"\x8b\x07" + HLT, rdi=DATA + PAGE)
    memory.denied.add(DATA // PAGE + 1)
    engine.set_guest_debug(ENABLE | STEP)
    assert run(engine) == Stage2Miss(DATA + PAGE)
    memory.denied.clear()
    assert run(engine) == at(CODE + 2)


def test_a_device(engine: UnicornEngine, memory: Memory) -> None:
    start(engine, memory, b"\x8b\x07" + HLT, rdi=DATA + PAGE)
    memory.denied.add(DATA // PAGE + 1)
    engine.set_guest_debug(ENABLE | STEP)
    assert run(engine) == Stage2Miss(DATA + PAGE)
    assert engine.emulate_mmio(DATA + PAGE, False) == MmioRead(DATA + PAGE, 4)
    engine.complete(5)
    assert run(engine) == at(CODE + 2)
    assert engine.get_regs().rax == 5


def test_a_port_is_its_own_stop(engine: UnicornEngine, memory: Memory) -> None:
    """As KVM has it: the exit of a port instruction takes the place of the step's."""
    start(engine, memory, b"\xe6\x80" + NOP + HLT)
    engine.set_guest_debug(ENABLE | STEP)
    assert [run(engine) for _ in range(3)] == [PortOut(0x80, 1, 0), at(CODE + 3), Halt()]


def test_int3_is_the_debuggers(engine: UnicornEngine, memory: Memory) -> None:
    """RIP is at it, again and again, until it is replaced."""
    start(engine, memory, NOP + INT3 + HLT)
    engine.set_guest_debug(ENABLE | SW_BP)
    for _ in range(2):
        stop = run(engine)
        assert isinstance(stop, Debug)
        assert (stop.vector, stop.rip, engine.get_regs().rip) == (3, CODE + 1, CODE + 1)
    memory.write(CODE + 1, NOP)
    engine.flush_tlb()
    assert run(engine) == Halt()


@pytest.mark.parametrize("control", [0, ENABLE, ENABLE | HW_BP])
def test_int3_is_the_guests(engine: UnicornEngine, memory: Memory, control: int) -> None:
    start(engine, memory, INT3 + HLT)
    engine.set_guest_debug(control)
    assert run(engine) == Halt()
    assert memory.word(STACK - 40) == CODE + 1


def test_int3_is_given_back(engine: UnicornEngine, memory: Memory) -> None:
    """As QEMU does with one that is not its own: #BP is injected, at the INT3, and the guest goes on behind it."""
    start(engine, memory, INT3 + HLT)
    engine.set_guest_debug(ENABLE | SW_BP)
    assert isinstance(run(engine), Debug)
    engine.set_events(dataclasses.replace(engine.get_events(), exception_injected=True, exception_nr=3))
    assert run(engine) == Halt()
    assert (memory.word(STACK - 40), engine.get_regs().rip) == (CODE + 1, CODE + 2)


def test_int_3_of_two_bytes_is_no_breakpoint(engine: UnicornEngine, memory: Memory) -> None:
    start(engine, memory, b"\xcd\x03" + HLT)
    engine.set_guest_debug(ENABLE | SW_BP)
    assert run(engine) == Halt()


def breakpoints(*addresses: int) -> tuple[int, ...]:
    """DR0 .. DR7, all enabled globally, on execution."""
    dr7 = DR7 | sum(2 << 2 * i for i in range(len(addresses)))
    return (*addresses, *(0,) * (7 - len(addresses)), dr7)


def test_hardware_breakpoints(engine: UnicornEngine, memory: Memory) -> None:
    """In front of the instruction, until RF says to go on. The guest's own registers stay."""
    start(engine, memory, NOP * 4 + HLT)
    registers = breakpoints(CODE + 3, CODE + 1)
    engine.set_guest_debug(ENABLE | HW_BP, registers)
    for _ in range(2):
        assert run(engine) == Debug(1, CODE + 1, DR6 | 2, registers[7])
    regs = engine.get_regs()
    engine.set_regs(dataclasses.replace(regs, rflags=regs.rflags | 1 << 16))
    assert run(engine) == Debug(1, CODE + 3, DR6 | 1, registers[7])
    assert not engine.get_regs().rflags >> 16 & 1
    assert engine.get_debug_registers().db == (0, 0, 0, 0)
    engine.set_guest_debug(0)
    assert run(engine) == Halt()


def test_hardware_breakpoint_in_front_of_the_first_instruction(engine: UnicornEngine, memory: Memory) -> None:
    start(engine, memory, NOP + HLT)
    engine.set_guest_debug(ENABLE | HW_BP, breakpoints(CODE))
    assert run(engine) == Debug(1, CODE, DR6 | 1, breakpoints(CODE)[7])


def test_a_loop_is_fast_enough(engine: UnicornEngine, memory: Memory) -> None:
    """Ten thousand instructions to a breakpoint behind a loop."""
    start(engine, memory, b"\xff\xc9\x75\xfc" + NOP + HLT, rcx=5000)  # dec ecx; jnz back
    engine.set_guest_debug(ENABLE | HW_BP, breakpoints(CODE + 4))
    assert run(engine) == Debug(1, CODE + 4, DR6 | 1, breakpoints(CODE + 4)[7])


WRITE, ACCESS = 1, 3
BYTES = {1: 0, 2: 1, 4: 3, 8: 2}


def watchpoint(address: int, kind: int, size: int) -> tuple[int, ...]:
    return address, *(0,) * 6, DR7 | 2 | kind << 16 | BYTES[size] << 18


@pytest.mark.parametrize(
    ("code", "kind", "size", "hit"),
    [
        (b"\x89\x07", WRITE, 4, True),  # mov [rdi], eax
        (b"\x89\x07", ACCESS, 4, True),
        (b"\x8b\x07", WRITE, 4, False),  # mov eax, [rdi]
        (b"\x8b\x07", ACCESS, 4, True),
        (b"\x89\x47\xfd", WRITE, 1, True),  # from 3 bytes below
        (b"\x89\x47\xfc", WRITE, 1, False),
        (b"\x89\x47\x07", WRITE, 8, True),
        (b"\x89\x47\x08", WRITE, 8, False),
        (b"\x01\x07", WRITE, 2, True),  # add [rdi], eax
    ],
)
def test_breakpoints_on_data(
    engine: UnicornEngine, memory: Memory, code: bytes, kind: int, size: int, hit: bool
) -> None:
    """Behind the instruction, which is done. What was executed before is watched as well."""
    start(engine, memory, code + HLT, rdi=DATA + 0x100, rax=7)
    assert run(engine) == Halt()
    engine.set_regs(dataclasses.replace(engine.get_regs(), rip=CODE, rax=7))
    registers = watchpoint(DATA + 0x100, kind, size)
    engine.set_guest_debug(ENABLE | HW_BP, registers)
    if hit:
        assert run(engine) == Debug(1, CODE + len(code), DR6 | 1, registers[7])
    assert run(engine) == Halt()
    engine.set_guest_debug(0)
    engine.set_regs(dataclasses.replace(engine.get_regs(), rip=CODE))
    assert run(engine) == Halt()


def test_a_breakpoint_on_a_page_that_is_missed(engine: UnicornEngine, memory: Memory) -> None:
    start(engine, memory, b"\x89\x07\x89\x07" + HLT, rdi=DATA + PAGE)
    memory.denied.add(DATA // PAGE + 1)
    registers = watchpoint(DATA + PAGE, WRITE, 4)
    engine.set_guest_debug(ENABLE | HW_BP, registers)
    assert run(engine) == Stage2Miss(DATA + PAGE, write=True)
    memory.denied.clear()
    assert [run(engine) for _ in range(2)] == [Debug(1, CODE + i, DR6 | 1, registers[7]) for i in (2, 4)]
    assert run(engine) == Halt()
