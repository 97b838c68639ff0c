"""Port exits: that they stop right after the instruction, and that every form of it is found."""

from __future__ import annotations

import pytest

from guestmem.cpu.engine import Halt, PortIn, PortOut, Stage2Miss
from guestmem.cpu.unicorn import UnicornEngine
from tests.cpu.guests import CODE, DATA, PAGE, TABLES, Memory, run, start_long, start_real

HLT = b"\xf4"
VALUE = 0x1122_3344_5566_7788


def start(engine: UnicornEngine, memory: Memory, code: bytes, address: int = CODE, **registers: int) -> None:
    start_long(engine, memory, code, address)
    regs = engine.get_regs()
    for name, value in registers.items():
        setattr(regs, name, value)
    engine.set_regs(regs)


@pytest.mark.parametrize(
    ("code", "size"),
    [(b"\xe6\x80", 1), (b"\x66\xe7\x80", 2), (b"\xe7\x80", 4), (b"\xee", 1), (b"\x66\xef", 2), (b"\x48\xef", 4)],
)
def test_out(engine: UnicornEngine, memory: Memory, code: bytes, size: int) -> None:
    start(engine, memory, code + HLT, rax=VALUE, rdx=0x1_0080, rflags=0xCD7)
    before = engine.get_regs()
    assert run(engine) == PortOut(0x80, size, VALUE & (1 << size * 8) - 1)
    before.rip += len(code)
    assert engine.get_regs() == before
    engine.set_sregs(engine.get_sregs())
    assert run(engine) == Halt()
    before.rip += 1
    assert engine.get_regs() == before


@pytest.mark.parametrize("repeat", range(2))
@pytest.mark.parametrize(
    "after",
    [
        b"\x48\x89\x07",  # mov [rdi], rax
        b"\x48\xff\xc0\x48\x89\x07",  # inc rax; mov [rdi], rax
        b"\x50",  # push rax
        b"\xff\x07",  # inc dword [rdi]
        b"\xe8\x00\x00\x00\x00",  # call
        b"\x90" * 40 + b"\xaa",  # stosb
        b"\xe6\x81",  # another out
        b"\x0f\xa2",  # cpuid
    ],
)
def test_nothing_runs_after_out(engine: UnicornEngine, memory: Memory, after: bytes, repeat: int) -> None:
    """The first time, and when the instruction is known already."""
    start(engine, memory, b"\xe6\x80" + after + HLT, rax=0x55, rdi=DATA)
    for _ in range(repeat):
        assert run(engine) == PortOut(0x80, 1, 0x55)
    regs = engine.get_regs()
    regs.rip = CODE
    engine.set_regs(regs)
    image = memory.read(0, TABLES)
    assert run(engine) == PortOut(0x80, 1, 0x55)
    regs.rip = CODE + 2
    assert engine.get_regs() == regs
    assert memory.read(0, TABLES) == image


@pytest.mark.parametrize(
    ("code", "size", "rax"),
    [
        (b"\xe4\x80", 1, 0x1122_3344_5566_77FF),
        (b"\x66\xe5\x80", 2, 0x1122_3344_5566_EEFF),
        (b"\xe5\x80", 4, 0xCCDD_EEFF),
        (b"\xec", 1, 0x1122_3344_5566_77FF),
        (b"\xed", 4, 0xCCDD_EEFF),
    ],
)
def test_in(engine: UnicornEngine, memory: Memory, code: bytes, size: int, rax: int) -> None:
    start(engine, memory, code + b"\xe6\x81" + HLT, rax=VALUE, rdx=0x80, rflags=0x8D7)
    before = engine.get_regs()
    for _ in range(2):
        # Asked again until it is answered; nothing of the instruction has happened.
        assert run(engine) == PortIn(0x80, size)
        assert engine.get_regs() == before
    engine.complete(0xAABB_CCDD_EEFF)
    assert run(engine) == PortOut(0x81, 1, 0xFF)
    before.rax, before.rip = rax, CODE + len(code) + 2
    assert engine.get_regs() == before


def test_a_value_for_an_instruction_that_was_left(engine: UnicornEngine, memory: Memory) -> None:
    start(engine, memory, b"\xe4\x80\xe4\x81" + HLT)
    assert run(engine) == PortIn(0x80, 1)
    regs = engine.get_regs()
    regs.rip += 2
    engine.set_regs(regs)
    engine.complete(7)
    assert run(engine) == PortIn(0x81, 1)
    engine.complete(8)
    assert run(engine) == Halt()
    assert engine.get_regs().rax == 8


def test_outs(engine: UnicornEngine, memory: Memory) -> None:
    memory.write(DATA, bytes(range(1, 9)))
    start(engine, memory, b"\x6e\xff\x07" + HLT, rsi=DATA, rdi=0x9000, rdx=0x70)
    assert run(engine) == PortOut(0x70, 1, 1)
    assert (engine.get_regs().rip, engine.get_regs().rsi) == (CODE + 1, DATA + 1)
    assert memory.word(0x9000) == 0
    assert run(engine) == Halt()
    assert memory.word(0x9000) == 1


def test_rep_outs(engine: UnicornEngine, memory: Memory) -> None:
    memory.write(DATA, bytes(range(1, 9)))
    start(engine, memory, b"\xf3\x66\x6f" + HLT, rsi=DATA, rdx=0x70, rcx=3)
    for i, value in enumerate((0x0201, 0x0403, 0x0605)):
        assert run(engine) == PortOut(0x70, 2, value)
        regs = engine.get_regs()
        assert (regs.rcx, regs.rsi) == (2 - i, DATA + 2 + i * 2)
    assert run(engine) == Halt()
    assert engine.get_regs().rip == CODE + 4


def test_rep_ins_backwards(engine: UnicornEngine, memory: Memory) -> None:
    start(engine, memory, b"\xfd\xf3\x6d" + HLT, rdi=DATA + 8, rdx=0x70, rcx=3)  # std; rep insd
    assert run(engine) == PortIn(0x70, 4, count=3)
    regs = engine.get_regs()
    assert (regs.rip, regs.rcx, regs.rdi) == (CODE + 1, 3, DATA + 8)
    engine.complete(0x3333_3333_2222_2222_1111_1111)
    assert (engine.get_regs().rcx, engine.get_regs().rdi) == (0, DATA - 4)
    assert run(engine) == Halt()
    assert memory.read(DATA, 12) == b"\x33" * 4 + b"\x22" * 4 + b"\x11" * 4


@pytest.mark.parametrize(
    ("code", "rdi", "rcx", "counts"),
    [
        (b"\xf3\x6c", DATA, 5, [5]),
        (b"\xf3\x6c", DATA, 2500, [1024, 1024, 452]),
        (b"\xf3\x66\x6d", DATA, 1000, [512, 488]),
        (b"\xf3\x6c", DATA + PAGE - 3, 8, [3, 5]),
        (b"\xf3\x66\x6d", DATA + PAGE - 3, 4, [3, 1]),
        (b"\x67\xf3\x6c", DATA, 0x1_0000_0003, [3]),
        (b"\x6c", DATA, 9, [1]),
    ],
)
def test_rep_ins_asks_ahead(
    engine: UnicornEngine, memory: Memory, code: bytes, rdi: int, rcx: int, counts: list[int]
) -> None:
    """As KVM: to the end of the page, and 1024 bytes; an element across the border is among those before it."""
    start(engine, memory, code + HLT, rdi=rdi, rdx=0x70, rcx=rcx)
    size, written = (2 if b"\x6d" in code else 1), b""
    for count in counts:
        assert run(engine) == PortIn(0x70, size, count)
        data = bytes((len(written) + i) * 3 + 1 & 0xFF for i in range(count * size))
        engine.complete(int.from_bytes(data, "little"))
        written += data
    assert run(engine) == Halt()
    assert memory.read(rdi, len(written) + 1) == written + b"\0"
    assert engine.get_regs().rdi == rdi + len(written)


@pytest.mark.parametrize(("asked", "instead", "taken"), [(2, 1, 1), (3, 6, 6), (5, 0, 0)])
def test_the_vmm_changes_the_counter(
    engine: UnicornEngine, memory: Memory, asked: int, instead: int, taken: int
) -> None:
    """As many are taken as the counter says then; there are no values for more than were asked for."""
    start(engine, memory, b"\xf3\x6c" + HLT, rdi=DATA, rdx=0x70, rcx=asked)
    assert run(engine) == PortIn(0x70, 1, asked)
    regs = engine.get_regs()
    regs.rcx = instead
    engine.set_regs(regs)
    engine.complete(0xAAAA_AAAA_AAAA & (1 << asked * 8) - 1)
    assert run(engine) == Halt()
    assert (engine.get_regs().rcx, engine.get_regs().rdi) == (0, DATA + taken)
    assert memory.read(DATA, 8) == (b"\xaa" * min(asked, taken)).ljust(8, b"\0")


def test_rep_ins_meets_a_page_that_is_missing(engine: UnicornEngine, memory: Memory) -> None:
    """The dummy write of the first element finds out; the values that are there are not asked for again."""
    start(engine, memory, b"\xf3\x66\x6d" + HLT, rdi=DATA + PAGE - 3, rdx=0x70, rcx=2)
    assert run(engine) == PortIn(0x70, 2, 2)
    memory.denied.add(DATA // PAGE + 1)
    engine.complete(0x4433_2211)
    assert engine.get_regs().rcx == 1
    assert run(engine) == Stage2Miss(DATA + PAGE, write=True)
    memory.denied.clear()
    assert run(engine) == Halt()
    assert memory.read(DATA + PAGE - 3, 4) == b"\x11\x22\x33\x44"


def test_string_io_and_stage_2(engine: UnicornEngine, memory: Memory) -> None:
    memory.denied.add(DATA // PAGE)
    start(engine, memory, b"\x6c\x6e" + HLT, rdi=DATA, rsi=DATA, rdx=0x70)
    assert run(engine) == Stage2Miss(DATA, write=True)
    memory.denied.clear()
    assert run(engine) == PortIn(0x70, 1)
    engine.complete(0x99)
    assert run(engine) == PortOut(0x70, 1, 0x99)


def test_out_across_two_pages(engine: UnicornEngine, memory: Memory) -> None:
    start(engine, memory, b"\xe6\x80\xff\x07" + HLT, address=2 * PAGE - 1, rdi=DATA)
    for _ in range(2):
        assert run(engine) == PortOut(0x80, 1, 0)
        regs = engine.get_regs()
        assert (regs.rip, memory.word(DATA)) == (2 * PAGE + 1, 0)
        regs.rip = 2 * PAGE - 1
        engine.set_regs(regs)


def test_what_was_rolled_back_may_have_freed_a_breakpoint(engine: UnicornEngine, memory: Memory) -> None:
    """DR7 is set, then a port instruction is met for the first time, and after it in the same block DR7 is cleared."""
    code = (
        b"\xb8\x00\x90\x00\x00\x0f\x23\xc0"  # mov eax, 0x9000; mov dr0, rax
        b"\xb8\x03\x00\x00\x00\x0f\x23\xf8"  # mov eax, 3; mov dr7, rax
        b"\x31\xc0\xe6\x80\x0f\x23\xf8"  # xor eax, eax; out 0x80, al; mov dr7, rax
    )
    for _ in range(20):
        start(engine, memory, code + b"\xeb\xe7")
        for _ in range(2):
            assert run(engine) == PortOut(0x80, 1, 0)
        memory.write(CODE, b"\x90")
        memory.write(CODE, code)


def test_the_instruction_changes_its_length(engine: UnicornEngine, memory: Memory) -> None:
    """The guest rewrites OUT 0x80, AL as OUT DX, AL: the instruction after it begins one byte earlier."""
    code = (
        b"\xe6\x80"  # 1: out 0x80, al
        b"\x40\xff\xc0"  # inc eax, or with the OUT one byte shorter: (0x80 0x40 0xff 0xc0) add byte [rax - 1], 0xc0
        b"\xc6\x04\x25\x00\x10\x00\x00\xee"  # mov byte [1b], 0xee
        b"\xeb\xf1"  # jmp 1b
    )
    start(engine, memory, code, rdx=0x71, rax=DATA)
    assert run(engine) == PortOut(0x80, 1, 0)
    assert run(engine) == PortOut(0x71, 1, 1)
    assert engine.get_regs().rip == CODE + 1
    assert memory.word(DATA, 1) == 0


def test_more_sites_than_are_remembered(engine: UnicornEngine, memory: Memory) -> None:
    """Three hundred port instructions, each met twice."""
    count = 300
    start_real(engine, memory, b"\xe6\x80\x40" * count + b"\xe9" + (-3 * count - 3 & 0xFFFF).to_bytes(2, "little"))
    for i in range(2 * count):
        assert run(engine) == PortOut(0x80, 1, i & 0xFF)
        assert engine.get_regs().rip == CODE + i % count * 3 + 2


@pytest.mark.parametrize(
    ("code", "rcx", "left"),
    [
        (b"\xf3\x6e", 0x1_0000_0001, 0x1_0000_0000),
        (b"\xf2\x6e", 2, 1),
        (b"\x67\xf3\x6e", 0x1_0000_0002, 1),
        (b"\x6e", 5, 5),
    ],
    ids=["rep", "repne", "addr32", "no rep"],
)
def test_the_counter_of_a_rep(engine: UnicornEngine, memory: Memory, code: bytes, rcx: int, left: int) -> None:
    start(engine, memory, code + HLT, rsi=DATA, rdx=0x70, rcx=rcx)
    assert run(engine) == PortOut(0x70, 1, 0)
    assert engine.get_regs().rcx == left


def test_the_counter_has_16_bits_in_16_bit_code(engine: UnicornEngine, memory: Memory) -> None:
    start_real(engine, memory, b"\xf3\x6e" + HLT)
    regs = engine.get_regs()
    regs.rcx, regs.rsi = 0x7_0001, DATA
    engine.set_regs(regs)
    assert run(engine) == PortOut(0, 1, 0)
    assert engine.get_regs().rcx == 0x7_0000
    assert run(engine) == Halt()
