"""One program, once in peace and then with everything that can interrupt it: the outcome must be the same.

The program loops over memory with read-modify-write, stack, string and flag-dependent instructions, and with those that
Unicorn leaves to us: CPUID, RDMSR, WRMSR, SYSCALL. It ends in HLT. It is interrupted by stage-2 misses of any page
(data, code, stack, page tables) in any kind, TLB flushes, ends of slices, registers written back as they are, and
exceptions that its handler answers.
"""

from __future__ import annotations

import random
import threading

import pytest

from guestmem.cpu.engine import Halt, PortOut, SliceOver, Stage2Miss, Stop
from guestmem.cpu.msrs import EFER, LSTAR, MISC_ENABLE, STAR
from guestmem.cpu.registers import DescriptorTable, Regs
from guestmem.cpu.unicorn import UnicornEngine
from guestmem.cpu.x86 import EFER_LME, EFER_SCE
from tests.cpu.guests import CODE, PAGE, STACK, TABLES, Memory, assemble, start_long

IDT, HANDLER = 0x20000, 0x9000
ARRAY, COPY, WORDS, ROUNDS = 0x30000, 0x40000, 0x1000, 30

PROGRAM = f"""
    mov ebp, {ROUNDS}
again:
    mov edi, {ARRAY}
    mov ecx, {WORDS}
    xor eax, eax
each:
    add qword ptr [rdi], rcx
    adc rax, [rdi]
    rol qword ptr [rdi], 7
    push rax
    call mix
    pop rbx
    xor rax, rbx
    lock xadd [rdi], rax
    add rdi, 8
    dec rcx
    jnz each
    mov esi, {ARRAY}
    mov edi, {COPY}
    mov ecx, {WORDS}
    rep movsq
    mov r12d, 40
others:
    mov eax, 1
    cpuid
    add [{COPY}], rax
    mov ecx, 0x1A0
    rdmsr
    inc eax
    wrmsr
    add [{COPY} + 8], rax
    syscall
    add [{COPY} + 16], rcx
    sti
    cli
    dec r12d
    jnz others
    out 0x80, al
    int 0x30
    inc qword ptr [{COPY}]
    ud2
    dec ebp
    jnz again
    hlt
entry:
    add r12, 0x10000
    sub r12, 0x10000
    add qword ptr [{COPY} + 24], 1
    jmp rcx
mix:
    pushfq
    imul rbx, rax, 0x1234567
    add [rsp + 16], rbx
    popfq
    ret
"""
HANDLER_CODE = """
    add qword ptr [0x50000], 1
    cmp byte ptr [rsp + 1], 0x10
    mov rdx, [rsp]
    cmp word ptr [rdx], 0x0b0f
    jne 1f
    add qword ptr [rsp], 2
1:  iretq
"""


def prepare(memory: Memory) -> UnicornEngine:
    engine = UnicornEngine(memory)
    code = assemble(PROGRAM)
    start_long(engine, memory, code)
    entry = code.index(b"\x49\x81\xc4\x00\x00\x01\x00")
    assert engine.set_msr(STAR, 8 << 32)
    assert engine.set_msr(LSTAR, CODE + entry)
    assert engine.set_msr(EFER, EFER_SCE | EFER_LME)
    memory.write(HANDLER, assemble(HANDLER_CODE, address=HANDLER))
    gate = (HANDLER & 0xFFFF | 8 << 16 | 0x8E << 40).to_bytes(16, "little")
    for vector in (6, 0x30):
        memory.write(IDT + vector * 16, gate)
    values = random.Random(1)
    memory.write(ARRAY, values.randbytes(WORDS * 8))
    sregs = engine.get_sregs()
    sregs.idt = DescriptorTable(IDT, 0xFFF)
    engine.set_sregs(sregs)
    return engine


def outcome(engine: UnicornEngine, memory: Memory) -> tuple[Regs, bytes]:
    """Registers and memory at the end. What lies below the stack, and accessed bits of tables, may differ."""
    image = memory.read(0, STACK - PAGE) + memory.read(STACK, TABLES - STACK)
    return engine.get_regs(), image


def disturb(engine: UnicornEngine, memory: Memory, chance: random.Random, stop: Stop) -> None:
    """What a host may do between two runs without the guest's knowledge."""
    if isinstance(stop, Stage2Miss):
        memory.denied.discard(stop.gpa // PAGE)
        memory.read_only.discard(stop.gpa // PAGE)
    action = chance.random()
    if action < 0.7:
        pages = [CODE, HANDLER, IDT, STACK - 8, TABLES + PAGE, TABLES + 4 * PAGE, 0x50000]
        pages += [chance.randrange(ARRAY, COPY + WORDS * 8) for _ in range(6)]
        chosen = {gpa // PAGE for gpa in chance.sample(pages, 3)}
        (memory.denied if chance.random() < 0.6 else memory.read_only).update(chosen)
        engine.flush_tlb()
    elif action < 0.8:
        engine.set_regs(engine.get_regs())
        engine.set_sregs(engine.get_sregs())


@pytest.fixture(scope="module")
def undisturbed() -> tuple[Regs, bytes]:
    memory = Memory()
    engine = prepare(memory)
    ports = 0
    while not isinstance(stop := engine.run(), Halt):
        assert isinstance(stop, PortOut | SliceOver)
        ports += isinstance(stop, PortOut)
    assert (ports, memory.word(0x50000)) == (ROUNDS, 2 * ROUNDS)
    assert engine.get_msr(MISC_ENABLE) == 1 + 40 * ROUNDS
    result = outcome(engine, memory)
    engine.close()
    memory.close()
    return result


def kick_until(engine: UnicornEngine, over: threading.Event) -> None:
    """End runs at any instruction."""
    while not over.wait(2e-5):
        engine.kick()


def run_disturbed(engine: UnicornEngine, memory: Memory, chance: random.Random) -> dict[str, int]:
    """To the end, with disturbances at each stop; how many stops of which kind there were."""
    kinds: dict[str, int] = {}
    for _ in range(20000):
        stop = engine.run()
        kinds[type(stop).__name__] = kinds.get(type(stop).__name__, 0) + 1
        if isinstance(stop, Halt):
            return kinds
        assert isinstance(stop, PortOut | SliceOver | Stage2Miss)
        disturb(engine, memory, chance, stop)
    raise AssertionError("no end")


@pytest.mark.parametrize("seed", range(4))
def test_the_outcome_is_the_same(memory: Memory, undisturbed: tuple[Regs, bytes], seed: int) -> None:
    engine, chance = prepare(memory), random.Random(seed)
    over = threading.Event()
    kicker = threading.Thread(target=kick_until, args=(engine, over))
    kicker.start()
    try:
        kinds = run_disturbed(engine, memory, chance)
    finally:
        over.set()
        kicker.join()
    assert kinds["Halt"] == 1
    assert kinds["PortOut"] == ROUNDS
    assert kinds["Stage2Miss"] > 100
    assert kinds["SliceOver"] > 0
    result = outcome(engine, memory)
    assert engine.get_msr(MISC_ENABLE) == 1 + 40 * ROUNDS
    engine.close()
    assert result[0] == undisturbed[0]
    assert result[1] == undisturbed[1]
