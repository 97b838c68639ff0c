"""Interrupts and NMIs from outside: when they are taken, and what the guest and the VMM see of it."""

from __future__ import annotations

import pytest

from guestmem.cpu.engine import Halt, InterruptWindow, PortOut, Shutdown, Stage2Miss
from guestmem.cpu.registers import DescriptorTable, Events
from guestmem.cpu.unicorn import UnicornEngine
from tests.cpu.guests import CODE, DATA, PAGE, STACK, Memory, run, start_long, start_real

IDT, HANDLER, VECTOR = 0x20000, 0x9000, 0x41
IF = 1 << 9
HLT, STI, CLI, NOP = b"\xf4", b"\xfb", b"\xfa", b"\x90"
INC_DATA = b"\x48\xff\x04\x25\x00\x50\x00\x00"  # inc qword [DATA]
IRETQ = b"\x48\xcf"
MOV_SS = b"\x8e\xd0"  # mov ss, ax


def start(
    engine: UnicornEngine, memory: Memory, code: bytes, handler: bytes = INC_DATA + IRETQ, rflags: int = 2
) -> None:
    start_long(engine, memory, code)
    memory.write(HANDLER, handler)
    for vector in (2, 14, VECTOR):
        memory.write(IDT + vector * 16, (HANDLER | 8 << 16 | 0x8E << 40).to_bytes(16, "little"))
    sregs = engine.get_sregs()
    sregs.idt = DescriptorTable(IDT, 0xFFF)
    engine.set_sregs(sregs)
    regs = engine.get_regs()
    regs.rflags, regs.rax = rflags, 0x10
    engine.set_regs(regs)


def frame(memory: Memory) -> list[int]:
    """RIP, CS, RFLAGS, RSP, SS as they were pushed; RSP was STACK."""
    return [memory.word(STACK - 40 + i * 8) for i in range(5)]


def test_taken_at_once(engine: UnicornEngine, memory: Memory) -> None:
    start(engine, memory, HLT, rflags=IF | 2)
    engine.queue_interrupt(VECTOR)
    assert run(engine) == Halt()
    assert memory.word(DATA) == 1
    assert frame(memory) == [CODE, 8, IF | 2, STACK, 0x10]
    assert engine.get_regs().rip == CODE + 1


def test_vector_of_an_exception_that_has_an_error_code(engine: UnicornEngine, memory: Memory) -> None:
    """From outside it pushes none, and the resume flag is not set."""
    start(engine, memory, HLT, rflags=IF | 2)
    engine.queue_interrupt(14)
    assert run(engine) == Halt()
    assert frame(memory)[0] == CODE
    assert frame(memory)[2] == IF | 2


@pytest.mark.parametrize(
    ("code", "at"),
    [
        (CLI + STI + NOP + HLT, 3),
        (STI + STI + HLT, 2),
        (b"\x68\x02\x02\x00\x00\x9d" + HLT, 6),  # push 0x202; popf
        (STI + b"\xeb\x01" + HLT + HLT, 4),  # sti; jmp
        (STI + MOV_SS + NOP + HLT, 3),
        (STI + b"\xe6\x80" + NOP + HLT, 3),  # sti; out
        (STI + b"\x0f\x32" + HLT, 3),  # sti; rdmsr
    ],
    ids=["sti", "sti sti", "popf", "jmp", "mov ss", "out", "rdmsr"],
)
def test_taken_at_the_first_moment(engine: UnicornEngine, memory: Memory, code: bytes, at: int) -> None:
    """After the instruction that follows STI, also if that has a shadow of its own, and right after POPF."""
    start(engine, memory, code, rflags=2)
    regs = engine.get_regs()
    regs.rcx = 0x10
    engine.set_regs(regs)
    engine.queue_interrupt(VECTOR)
    stop = run(engine)
    while isinstance(stop, PortOut):
        stop = run(engine)
    assert stop == Halt()
    assert memory.word(DATA) == 1
    assert frame(memory)[0] == CODE + at


def test_a_loop_that_opens_for_one_instruction(engine: UnicornEngine, memory: Memory) -> None:
    """1: cli; inc rcx; sti; nop; jmp 1b. It is one block, which runs by itself once it is translated."""
    start(engine, memory, CLI + b"\x48\xff\xc1" + STI + NOP + b"\xeb\xf8", HLT)
    while engine.get_regs().rcx < 1000:
        engine.run()
    engine.queue_interrupt(VECTOR)
    assert run(engine) == Halt()
    assert frame(memory)[0] == CODE + 6


def test_waits_while_interrupts_are_off(engine: UnicornEngine, memory: Memory) -> None:
    start(engine, memory, NOP + HLT + STI + NOP + HLT)
    engine.queue_interrupt(VECTOR)
    assert run(engine) == Halt()
    assert memory.word(DATA) == 0
    assert engine.get_events().interrupt_injected
    assert run(engine) == Halt()
    assert memory.word(DATA) == 1
    assert engine.get_events() == Events()


def test_window(engine: UnicornEngine, memory: Memory) -> None:
    start(engine, memory, NOP + STI + NOP + HLT)
    engine.request_interrupt_window = True
    assert not engine.ready_for_interrupt_injection
    for _ in range(2):
        assert run(engine) == InterruptWindow()
        assert engine.get_regs().rip == CODE + 3
        assert engine.ready_for_interrupt_injection
    engine.queue_interrupt(VECTOR)
    assert not engine.ready_for_interrupt_injection
    assert run(engine) == InterruptWindow()
    assert (engine.get_regs().rip, memory.word(DATA)) == (CODE + 3, 1)
    engine.request_interrupt_window = False
    assert run(engine) == Halt()


def test_no_window_in_the_shadow(engine: UnicornEngine, memory: Memory) -> None:
    start(engine, memory, STI + HLT + HLT)
    engine.request_interrupt_window = True
    assert run(engine) == Halt()
    assert engine.get_regs().rip == CODE + 2
    assert run(engine) == InterruptWindow()


def test_delivery_is_repeated_after_a_miss(engine: UnicornEngine, memory: Memory) -> None:
    start(engine, memory, HLT, rflags=IF | 2)
    memory.denied.add(IDT // PAGE)
    engine.queue_interrupt(VECTOR)
    assert run(engine) == Stage2Miss(IDT + VECTOR * 16)
    assert engine.get_events() == Events(interrupt_injected=True, interrupt_nr=VECTOR)
    memory.denied.clear()
    assert run(engine) == Halt()
    assert memory.word(DATA) == 1


def test_moving_rip_does_not_lose_an_interrupt(engine: UnicornEngine, memory: Memory) -> None:
    start(engine, memory, HLT + NOP + HLT, rflags=IF | 2)
    memory.denied.add(IDT // PAGE)
    engine.queue_interrupt(VECTOR)
    assert run(engine) == Stage2Miss(IDT + VECTOR * 16)
    memory.denied.clear()
    regs = engine.get_regs()
    regs.rip = CODE + 1
    engine.set_regs(regs)
    assert run(engine) == Halt()
    assert (memory.word(DATA), frame(memory)[0]) == (1, CODE + 1)


def test_nmi_whatever_rflags_say(engine: UnicornEngine, memory: Memory) -> None:
    start(engine, memory, NOP + HLT)
    engine.queue_nmi()
    assert run(engine) == Halt()
    assert (memory.word(DATA), frame(memory)[0]) == (1, CODE)
    assert engine.get_events() == Events()


def test_nmi_waits_for_the_end_of_the_last(engine: UnicornEngine, memory: Memory) -> None:
    """The handler halts before its IRET; the second NMI comes right after that."""
    start(engine, memory, NOP + HLT, INC_DATA + HLT + IRETQ)
    engine.queue_nmi()
    assert run(engine) == Halt()
    engine.queue_nmi()
    assert engine.get_events() == Events(nmi_pending=True, nmi_masked=True)
    assert run(engine) == Halt()
    assert (memory.word(DATA), frame(memory)[0]) == (2, CODE)
    assert engine.get_events() == Events(nmi_masked=True)


def test_nmi_waits_for_the_shadow(engine: UnicornEngine, memory: Memory) -> None:
    start(engine, memory, STI + b"\xe6\x80" + HLT)
    engine.set_events(Events(interrupt_shadow=2, nmi_pending=True))
    regs = engine.get_regs()
    regs.rip = CODE + 1
    engine.set_regs(regs)
    assert engine.get_events() == Events(interrupt_shadow=2, nmi_pending=True)
    assert run(engine) == PortOut(0x80, 1, 0x10)
    assert memory.word(DATA) == 0
    assert run(engine) == Halt()
    assert frame(memory)[0] == CODE + 3


def test_real_mode(engine: UnicornEngine, memory: Memory) -> None:
    start_real(engine, memory, STI + NOP + HLT)
    memory.set_word(VECTOR * 4, HANDLER, 4)
    memory.write(HANDLER, b"\x40\xcf")  # inc ax; iret
    engine.queue_interrupt(VECTOR)
    assert run(engine) == Halt()
    assert engine.get_regs().rax == 1


def test_events_go_through(engine: UnicornEngine, memory: Memory) -> None:
    """What is saved in one vCPU and restored in another is delivered there."""
    start(engine, memory, HLT, HLT, rflags=2)
    fault = Events(exception_injected=True, exception_nr=14, exception_error_code=2, exception_payload=0x1234)
    for events in (fault, Events(nmi_injected=True, nmi_masked=True), Events(interrupt_injected=True, interrupt_nr=7)):
        engine.set_events(events)
        assert engine.get_events() == events
    engine.set_events(fault)
    assert run(engine) == Halt()
    assert engine.get_sregs().cr2 == 0x1234
    assert memory.word(STACK - 48) == 2
    assert engine.get_events() == Events()


def test_soft_interrupt_returns_behind_it(engine: UnicornEngine, memory: Memory) -> None:
    start(engine, memory, HLT, HLT)
    soft = Events(interrupt_injected=True, interrupt_nr=VECTOR, interrupt_soft=True)
    engine.set_events(soft)
    assert engine.get_events() == soft
    assert run(engine) == Halt()
    assert engine.get_regs().rip == HANDLER + 1


def test_nobody_to_take_it(engine: UnicornEngine, memory: Memory) -> None:
    start_long(engine, memory, HLT)
    engine.queue_nmi()
    assert run(engine) == Shutdown()


def test_vectors_have_eight_bits(engine: UnicornEngine) -> None:
    with pytest.raises(ValueError, match="256"):
        engine.queue_interrupt(256)
