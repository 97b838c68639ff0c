"""Instructions on general registers that a guest may use without more ado, each with its result.

Unicorn takes some of them for SSE, which CR0.TS, CR0.EM and CR4.OSFXSR can forbid. The results are those of the
manuals' pseudocode.
"""

from __future__ import annotations

import pytest

from guestmem.cpu.engine import Halt, MmioRead, Stage2Miss
from guestmem.cpu.unicorn import UnicornEngine
from tests.cpu.guests import CODE, DATA, PAGE, STACK, TABLES, Memory, run, start_long

HLT = b"\xf4"
OSFXSR, FSGSBASE = 1 << 9, 1 << 16
EM, TS = 1 << 2, 1 << 3
A, B = 0x0123_4567_89AB_CDEF, 0x0F0F_0000_FFFF_0004
MASK = (1 << 64) - 1
IDT, HANDLER = 0x20000, 0x9000
DB, UD, NM, PF = 1, 6, 7, 14


def deposit(source: int, mask: int) -> int:
    """PDEP."""
    places = [bit for bit in range(64) if mask >> bit & 1]
    return sum((source >> i & 1) << place for i, place in enumerate(places))


def extract(source: int, mask: int) -> int:
    """PEXT."""
    places = [bit for bit in range(64) if mask >> bit & 1]
    return sum((source >> place & 1) << i for i, place in enumerate(places))


def crc32c(crc: int, value: int, size: int) -> int:
    """CRC32: no inversion at either end."""
    for bit in range(size * 8):
        crc ^= value >> bit & 1
        crc = crc >> 1 ^ (0x82F6_3B78 if crc & 1 else 0)
    return crc


# RAX is the result; before it RBX is A, RCX is B, RDX is 3, the word at DATA is A.
CASES = {
    "shlx rax, rbx, rcx": ("c4e2f1f7c3", A << 4 & MASK),
    "shrx rax, rbx, rcx": ("c4e2f3f7c3", A >> 4),
    "sarx rax, rbx, rcx": ("c4e2f2f7c3", A >> 4),
    "shlx eax, [rdi], ecx": ("c4e271f707", A << 4 & 0xFFFF_FFFF),
    "rorx rax, rbx, 4": ("c4e3fbf0c304", A >> 4 | (A & 15) << 60),
    "mulx rax, rcx, rbx": ("c4e2f3f6c3", A * 3 >> 64),
    "pdep rax, rbx, rcx": ("c4e2e3f5c1", deposit(A, B)),
    "pext rax, rbx, rcx": ("c4e2e2f5c1", extract(A, B)),
    "andn rax, rbx, rcx": ("c4e2e0f2c1", ~A & B),
    "mov edx, 0x1008; bextr rax, rbx, rdx": ("ba08100000c4e2e8f7c3", A >> 8 & 0xFFFF),
    "bzhi rax, rbx, rdx": ("c4e2e8f5c3", A & 7),
    "blsr rax, rbx": ("c4e2f8f3cb", A & A - 1),
    "blsi rax, rcx": ("c4e2f8f3d9", B & -B),
    "blsmsk rax, rcx": ("c4e2f8f3d1", B ^ B - 1),
    "adcx rax, rbx": ("66480f38f6c3", A + 0x55),
    "adox rax, rbx": ("f3480f38f6c3", A + 0x55),
    "movbe eax, [rdi]": ("0f38f007", 0xEFCD_AB89),
    "movbe ax, [rdi]": ("660f38f007", 0xEFCD),
    "movbe [rdi], rbx; mov rax, [rdi]": ("480f38f11f488b07", int.from_bytes(A.to_bytes(8, "little"), "big")),
    "crc32 rax, rbx": ("f2480f38f1c3", crc32c(0x55, A, 8)),
    "crc32 eax, byte [rdi]": ("f20f38f007", crc32c(0x55, A & 0xFF, 1)),
    "crc32 eax, bx": ("66f20f38f1c3", crc32c(0x55, A & 0xFFFF, 2)),
    "popcnt rax, rbx": ("f3480fb8c3", A.bit_count()),
    "tzcnt rax, rcx": ("f3480fbcc1", 2),
    "lzcnt rax, rcx": ("f3480fbdc1", 4),
    "movnti [rdi], rcx; mov rax, [rdi]": ("480fc30f488b07", B),
}


def set_handler(memory: Memory, vector: int) -> None:
    memory.write(IDT + vector * 16, (HANDLER | 8 << 16 | 0x8E << 40).to_bytes(16, "little"))


def start(engine: UnicornEngine, memory: Memory, code: bytes, cr4: int, cr0: int = 0) -> None:
    """Flags clear; a handler of #UD and #NM halts with RIP in HANDLER's page."""
    start_long(engine, memory, code + HLT)
    memory.set_word(DATA, A)
    memory.write(HANDLER, HLT)
    set_handler(memory, UD)
    set_handler(memory, NM)
    sregs = engine.get_sregs()
    sregs.idt.base, sregs.idt.limit = IDT, 0xFFF
    sregs.cr4 = sregs.cr4 & ~(OSFXSR | FSGSBASE) | cr4
    sregs.cr0 |= cr0
    engine.set_sregs(sregs)
    regs = engine.get_regs()
    regs.rax, regs.rbx, regs.rcx, regs.rdx, regs.rdi, regs.rsp = 0x55, A, B, 3, DATA, STACK
    engine.set_regs(regs)


@pytest.mark.parametrize(
    ("cr4", "cr0"), [(OSFXSR, 0), (0, 0), (OSFXSR, TS), (0, EM)], ids=["osfxsr", "no_osfxsr", "ts", "em"]
)
@pytest.mark.parametrize("name", CASES)
def test_result(engine: UnicornEngine, memory: Memory, name: str, cr4: int, cr0: int) -> None:
    code, result = CASES[name]
    start(engine, memory, bytes.fromhex(code), cr4, cr0)
    assert run(engine) == Halt()
    regs, sregs = engine.get_regs(), engine.get_sregs()
    assert (regs.rip, hex(regs.rax)) == (CODE + len(code) // 2 + 1, hex(result))
    assert (sregs.cr4 & OSFXSR, sregs.cr0 & (EM | TS)) == (cr4, cr0)


SSE = {"movaps xmm0, xmm1": "0f28c1", "vpxor xmm0, xmm0, xmm0": "c5f9efc0", "pshufb xmm0, xmm1": "660f3800c1",
       "palignr xmm0, xmm1, 1": "660f3a0fc101"}  # fmt: skip


@pytest.mark.parametrize(("cr4", "cr0", "vector"), [(0, 0, UD), (OSFXSR, EM, UD), (OSFXSR, TS, NM)])
@pytest.mark.parametrize("name", SSE)
def test_sse_does_not(engine: UnicornEngine, memory: Memory, name: str, cr4: int, cr0: int, vector: int) -> None:
    start(engine, memory, bytes.fromhex(SSE[name]), cr4, cr0)
    memory.write(HANDLER + 16, HLT)
    memory.set_word(IDT + vector * 16, HANDLER + 16 | 8 << 16 | 0x8E << 40)
    assert run(engine) == Halt()
    assert engine.get_regs().rip == HANDLER + 17
    assert memory.word(STACK - 40) == CODE


SHLX = bytes.fromhex("c4e271f707")  # shlx eax, [rdi], ecx


def test_memory_that_is_missing(engine: UnicornEngine, memory: Memory) -> None:
    start(engine, memory, SHLX, 0)
    memory.denied.add(DATA // PAGE)
    assert run(engine) == Stage2Miss(DATA)
    memory.denied.clear()
    assert run(engine) == Halt()
    assert engine.get_regs().rax == A << 4 & 0xFFFF_FFFF


def test_a_device(engine: UnicornEngine, memory: Memory) -> None:
    start(engine, memory, SHLX, 0)
    memory.denied.add(DATA // PAGE)
    assert run(engine) == Stage2Miss(DATA)
    before = engine.get_regs()
    assert engine.emulate_mmio(DATA, False) == MmioRead(DATA, 4)
    assert engine.get_regs() == before
    engine.complete(0x1122_3344)
    assert run(engine) == Halt()
    assert engine.get_regs().rax == 0x1223_3440


def test_at_the_end_of_the_last_page(engine: UnicornEngine, memory: Memory) -> None:
    """Nothing beyond the instruction is fetched."""
    code = bytes.fromhex("c4e2f1f7c3")
    last = CODE + PAGE - len(code) - 1
    start(engine, memory, b"", 0)
    memory.write(last, code + HLT)
    memory.set_word(TABLES + 4 * PAGE + (CODE // PAGE + 1) * 8, 0)
    regs = engine.get_regs()
    regs.rip = last
    engine.set_regs(regs)
    assert run(engine) == Halt()
    assert engine.get_regs().rax == A << 4 & MASK


def test_a_form_that_there_is_not(engine: UnicornEngine, memory: Memory) -> None:
    """SHLX with VEX.L."""
    start(engine, memory, bytes.fromhex("c4e275f7c3"), 0)
    assert run(engine) == Halt()
    assert (engine.get_regs().rip, memory.word(STACK - 40)) == (HANDLER + 1, CODE)


def test_page_fault_of_its_operand(engine: UnicornEngine, memory: Memory) -> None:
    start(engine, memory, SHLX, 0)
    set_handler(memory, PF)
    regs = engine.get_regs()
    regs.rdi = 1 << 46
    engine.set_regs(regs)
    assert run(engine) == Halt()
    assert (engine.get_sregs().cr2, memory.word(STACK - 40)) == (1 << 46, CODE)


def test_traced(engine: UnicornEngine, memory: Memory) -> None:
    """RFLAGS.TF: #DB comes once, after it."""
    start(engine, memory, bytes.fromhex("c4e2f1f7c3"), 0)
    set_handler(memory, DB)
    regs = engine.get_regs()
    regs.rflags |= 1 << 8
    engine.set_regs(regs)
    assert run(engine) == Halt()
    assert (memory.word(STACK - 40), engine.get_regs().rip) == (CODE + 5, HANDLER + 1)


@pytest.mark.parametrize("code", ["48 0fc7f0", "48 0fc7f8"], ids=["rdrand", "rdseed"])
@pytest.mark.parametrize("cr4", [OSFXSR, 0])
def test_random_numbers(engine: UnicornEngine, memory: Memory, code: str, cr4: int) -> None:
    """Twice, with CF set, and not the same number."""
    start(engine, memory, bytes.fromhex(code) + b"\x48\x89\xc3" + bytes.fromhex(code), cr4)
    assert run(engine) == Halt()
    regs = engine.get_regs()
    assert regs.rflags & 1
    assert len({regs.rax, regs.rbx, 0, A, 0x55}) == 5


BASES = {"rdfsbase": "f3480faec0", "rdgsbase": "f3480faec8", "wrfsbase": "f3480faed3", "wrgsbase": "f3480faedb"}


def test_bases(engine: UnicornEngine, memory: Memory) -> None:
    """wrfsbase rbx; rdfsbase rax; wrgsbase rcx; rdgsbase rdx"""
    start(engine, memory, bytes.fromhex("f3480faed3 f3480faec0 f3480faed9 f3480faeca"), FSGSBASE)
    regs = engine.get_regs()
    regs.rbx, regs.rcx = 0x7FFF_1234_5678, 0xFFFF_8000_0000_1000
    engine.set_regs(regs)
    assert run(engine) == Halt()
    regs, sregs = engine.get_regs(), engine.get_sregs()
    assert (regs.rax, sregs.fs.base) == (0x7FFF_1234_5678,) * 2
    assert (regs.rdx, sregs.gs.base) == (0xFFFF_8000_0000_1000,) * 2


@pytest.mark.parametrize("name", BASES)
def test_bases_need_fsgsbase(engine: UnicornEngine, memory: Memory, name: str) -> None:
    start(engine, memory, bytes.fromhex(BASES[name]), 0)
    assert run(engine) == Halt()
    assert engine.get_regs().rip == HANDLER + 1
