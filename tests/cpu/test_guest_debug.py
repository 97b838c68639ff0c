"""KVM_SET_GUEST_DEBUG: single steps, INT3, and breakpoints in debug registers that are not the guest's."""

from __future__ import annotations

from guestmem.cpu.engine import Debug, Halt, MmioRead, MmioWrite, PortOut, Stage2Miss
from guestmem.cpu.registers import DebugRegisters
from guestmem.cpu.unicorn import UnicornEngine
from tests.cpu.guests import CODE, DATA, PAGE, Memory, assemble, run, start_long

DEVICE = 0x200000
ENABLE, SINGLESTEP, SW_BP, HW_BP = 1, 2, 1 << 16, 1 << 17
SOURCE = f"mov eax, 1; inc eax; out 0x80, al; mov [{DATA}], eax; mov ecx, [{DATA}]; hlt"
CODE_BYTES = assemble(SOURCE)


def debug(engine: UnicornEngine, control: int, *registers: int) -> None:
    """Registers are DR0 to DR3 and DR7."""
    engine.set_guest_debug(control, (*registers[:4], 0, 0, 0, registers[4]) if registers else (0,) * 8)


def test_each_instruction(engine: UnicornEngine, memory: Memory) -> None:
    start_long(engine, memory, CODE_BYTES)
    debug(engine, ENABLE | SINGLESTEP)
    places = []
    while not isinstance(stop := run(engine), Halt):
        if isinstance(stop, Debug):
            assert stop.vector == 1 and stop.dr6 & 1 << 14
            assert stop.rip == engine.get_regs().rip
            places.append(stop.rip - CODE)
        else:
            assert stop == PortOut(0x80, 1, 2)
    assert places == [5, 7, 9, 16, 23]
    assert engine.get_regs().rflags & 1 << 8 == 0


def test_int3_is_the_hosts(engine: UnicornEngine, memory: Memory) -> None:
    start_long(engine, memory, b"\x90\xcc")
    debug(engine, ENABLE | SW_BP)
    stop = run(engine)
    assert isinstance(stop, Debug) and (stop.vector, stop.rip) == (3, CODE + 1)
    assert engine.get_regs().rip == CODE + 1
    memory.write(CODE + 1, b"\xf4")
    assert run(engine) == Halt()


def test_breakpoint_and_watchpoint(engine: UnicornEngine, memory: Memory) -> None:
    start_long(engine, memory, CODE_BYTES)
    engine.set_debug_registers(DebugRegisters((1, 2, 3, 4), 0xFFFF0FF0, 0x400))
    debug(engine, ENABLE | HW_BP, CODE + 5, DATA, 0, 0, 0x2 | 0x8 | 1 << 20 | 3 << 22)
    stop = run(engine)
    assert isinstance(stop, Debug) and (stop.vector, stop.rip, stop.dr6 & 15) == (1, CODE + 5, 1)
    regs = engine.get_regs()
    assert regs.rax == 1
    regs.rflags |= 1 << 16  # RF: once past it
    engine.set_regs(regs)
    assert run(engine) == PortOut(0x80, 1, 2)
    stop = run(engine)
    assert isinstance(stop, Debug) and (stop.rip, stop.dr6 & 15) == (CODE + 16, 2)
    assert memory.word(DATA, 4) == 2
    assert engine.get_debug_registers() == DebugRegisters((1, 2, 3, 4), 0xFFFF0FF0, 0x400)
    debug(engine, 0)
    assert run(engine) == Halt()


def test_watchpoint_of_an_instruction_that_uses_mmio(engine: UnicornEngine, memory: Memory) -> None:
    """The device is accessed once, at its own address, and the trap comes after it."""
    memory.denied.add(DEVICE // PAGE)
    for code, source, target in ((b"\xa7", DEVICE, DATA), (b"\xa5", DEVICE, DATA), (b"\xa5", DATA, DEVICE)):
        start_long(engine, memory, code + b"\xf4")
        memory.set_word(DATA, 0x1234, 4)
        regs = engine.get_regs()
        regs.rsi, regs.rdi = source, target
        engine.set_regs(regs)
        debug(engine, ENABLE | HW_BP, DATA, 0, 0, 0, 1 | 0xF << 16)
        assert isinstance(run(engine), Stage2Miss)
        stop = engine.emulate_mmio(DEVICE, target == DEVICE)
        if source == DEVICE:
            assert stop == MmioRead(DEVICE, 4)
            engine.complete(0x1234)
            stop = run(engine)
        assert isinstance(stop, Debug) and (stop.rip, stop.dr6 & 15) == (CODE + 1, 1)
        if target == DEVICE:
            assert run(engine) == MmioWrite(DEVICE, 4, 0x1234)
        assert run(engine) == Halt()
        assert engine.get_regs().rflags & 1 << 6 == (1 << 6 if code == b"\xa7" else 0)


def test_the_guests_own_breakpoint_on_data(engine: UnicornEngine, memory: Memory) -> None:
    """The trap comes after the store; a load does not hit."""
    source = f"mov eax, {DATA}; mov dr0, rax; mov eax, 0xd0402; mov dr7, rax; mov cl, [{DATA}]; mov [{DATA}], al; hlt"
    start_long(engine, memory, assemble(source))
    memory.write(0x6000 + 16, (0x7000 | 8 << 16 | 0x8E << 40).to_bytes(16, "little"))
    memory.write(0x7000, assemble("mov rax, dr6; hlt", address=0x7000))
    sregs = engine.get_sregs()
    sregs.idt.base, sregs.idt.limit = 0x6000, 0xFFF
    engine.set_sregs(sregs)
    assert run(engine) == Halt()
    regs = engine.get_regs()
    assert regs.rip > 0x7000 and regs.rax & 15 == 1
    assert memory.word(regs.rsp) == CODE + len(assemble(source)) - 1
    assert memory.read(DATA, 1) == b"\x02"
