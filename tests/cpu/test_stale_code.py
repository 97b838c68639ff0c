"""Code that was rewritten is what executes, whoever wrote it and by which address."""

from __future__ import annotations

import itertools
import random

import pytest

from guestmem.cpu.engine import Halt, PortOut
from guestmem.cpu.unicorn import UnicornEngine
from tests.cpu.guests import CODE, PAGE, TABLES, Memory, assemble, run, start_long
from tests.cpu.test_parallel import check

TARGET = 0x20000
LINEAR = (0x20000, 0x80000, 0x91000)
"""The same page at three linear addresses."""
CR3 = "mov rax, cr3; mov cr3, rax"


def start(engine: UnicornEngine, memory: Memory, source: str) -> None:
    memory.write(TARGET, b"\xb0\x00\xc3")  # mov al, 0; ret
    start_long(engine, memory, assemble(source))
    for linear in LINEAR:
        memory.set_word(TABLES + 4 * PAGE + linear // PAGE * 8, TARGET | 7)


def step(written: int, executed: int, value: int, between: str = "") -> str:
    """The guest writes `mov al, value` by one address, executes it by another, and tells what AL is."""
    return f"mov byte ptr [{written} + 1], {value}\n{between}\nmov ebx, {executed}\ncall rbx\nout 0x80, al\n"


@pytest.mark.parametrize("between", ["", CR3, "out 0x81, al", f"invlpg [{LINEAR[0]}]", "cpuid"])
@pytest.mark.parametrize(("written", "executed"), list(itertools.product(LINEAR[:2], repeat=2)))
def test_two_addresses(engine: UnicornEngine, memory: Memory, written: int, executed: int, between: str) -> None:
    start(engine, memory, "".join(step(written, executed, n, between) for n in range(1, 6)) + "hlt")
    for n in range(1, 6):
        while (stop := run(engine)) != PortOut(0x80, 1, n):
            assert isinstance(stop, PortOut) and stop.port == 0x81, stop
    assert run(engine) == Halt()


@pytest.mark.parametrize("seed", range(8))
def test_any_order_of_three_addresses(engine: UnicornEngine, memory: Memory, seed: int) -> None:
    """Some pages are written a second time by the same address, and executed by another in between."""
    chance = random.Random(seed)
    between = ("", "", "", CR3, f"invlpg [{LINEAR[1]}]")
    steps = [
        (chance.choice(LINEAR), chance.choice(LINEAR), chance.randrange(256), chance.choice(between))
        for _ in range(120)
    ]
    start(engine, memory, "".join(step(*what) for what in steps) + "hlt")
    for _, _, value, _ in steps:
        assert run(engine) == PortOut(0x80, 1, value)
    assert run(engine) == Halt()


def test_a_loop_that_rewrites_what_it_calls(engine: UnicornEngine, memory: Memory) -> None:
    """As text_poke does it: by another address, thousands of times, with what it calls translated each time."""
    source = f"""
        xor ecx, ecx
    1:  mov byte ptr [{LINEAR[1]} + 1], cl
        mov ebx, {LINEAR[0]}
        call rbx
        cmp al, cl
        jne 2f
        inc ecx
        cmp ecx, 5000
        jb 1b
    2:  hlt
    """
    start(engine, memory, source)
    assert run(engine) == Halt()
    assert engine.get_regs().rcx == 5000


def test_data_beside_code_stays_cheap(engine: UnicornEngine, memory: Memory) -> None:
    """A program that writes to its own page by its own address has it translated once."""
    start(engine, memory, f"mov ecx, 100000\n1: inc dword ptr [{CODE} + 2048]\ndec ecx\njnz 1b\nhlt")
    assert run(engine) == Halt()
    assert memory.word(CODE + 2048, 4) == 100000
    assert engine.block.code_flushes < 10


def test_frame_beside_code(engine: UnicornEngine, memory: Memory) -> None:
    """The frame of an exception overwrites code that was executed."""
    memory.write(0x6000 + 6 * 16, (0x7000 | 8 << 16 | 0x8E << 40).to_bytes(16, "little"))
    memory.write(0x7000, assemble("mov ebx, 0x20ff8; jmp rbx", address=0x7000))
    memory.write(TARGET + 0xFF8, b"\xc3")
    start(engine, memory, "mov ebx, 0x20ff8\ncall rbx\nmov ecx, cs\nmov esp, 0x21000\nud2")
    memory.write(TARGET + 0xFF0, bytes(8) + b"\xc3")
    sregs, regs = engine.get_sregs(), engine.get_regs()
    sregs.idt.base, sregs.idt.limit = 0x6000, 0xFFF
    # SS, the last word of the frame, is at 0x20ff8: F4 is HLT
    sregs.ss.selector = 0xF4
    engine.set_sregs(sregs)
    engine.set_regs(regs)
    assert run(engine) == Halt()


def test_the_host_writes_between_runs(engine: UnicornEngine, memory: Memory) -> None:
    start(engine, memory, f"1: mov ebx, {LINEAR[0]}\ncall rbx\nout 0x80, al\njmp 1b")
    for n in range(20):
        memory.write(TARGET + 1, bytes((n,)))
        assert run(engine) == PortOut(0x80, 1, n)


def test_another_cpu_writes() -> None:
    check("modified_across", "3000")
