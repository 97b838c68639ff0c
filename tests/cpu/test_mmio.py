"""Instructions that use MMIO: the exits they give, in order, and the registers after them."""

from __future__ import annotations

import pytest

from guestmem.cpu.engine import Failed, Halt, MmioRead, MmioWrite, PortIn, PortOut, Stage2Miss, Stop
from guestmem.cpu.unicorn import UnicornEngine
from tests.cpu.guests import CODE, DATA, PAGE, STACK, TABLES, Memory, run, start_long

HLT = b"\xf4"
MMIO, IDT, HANDLER = 0x200000, 0x20000, 0x9000
VALUE = 0x1122_3344_5566_7788


@pytest.fixture(autouse=True)
def device(memory: Memory) -> None:
    memory.denied.update((MMIO // PAGE, MMIO // PAGE + 1))


def start(engine: UnicornEngine, memory: Memory, code: bytes, **registers: int) -> None:
    """RDI points to the device."""
    start_long(engine, memory, code + HLT)
    regs = engine.get_regs()
    for name, value in ({"rdi": MMIO} | registers).items():
        setattr(regs, name, value)
    engine.set_regs(regs)


def to_the_end(engine: UnicornEngine, *values: int) -> list[Stop]:
    """Play KVM: a miss in the device is emulated, reads are answered by `values`. The stops but the misses."""
    stops: list[Stop] = []
    answers = list(values)
    while not stops or not isinstance(stops[-1], Halt | Failed):
        stop = run(engine)
        if isinstance(stop, Stage2Miss):
            stop = engine.emulate_mmio(stop.gpa, stop.write)
        stops.append(stop)
        if isinstance(stop, MmioRead):
            engine.complete(answers.pop(0))
    assert not answers
    return stops


@pytest.mark.parametrize(
    ("code", "size"),
    [(b"\x88\x47\x03", 1), (b"\x66\x89\x47\x03", 2), (b"\x89\x47\x03", 4), (b"\x48\x89\x47\x03", 8)],
    ids=["mov8", "mov16", "mov32", "mov64"],
)
def test_write(engine: UnicornEngine, memory: Memory, code: bytes, size: int) -> None:
    """One exit whatever the size, and also where it is not aligned."""
    start(engine, memory, code, rax=VALUE)
    assert run(engine) == Stage2Miss(MMIO + 3, write=True)
    assert engine.emulate_mmio(MMIO + 3, True) == MmioWrite(MMIO + 3, size, VALUE & (1 << size * 8) - 1)
    regs = engine.get_regs()
    assert (regs.rip, regs.rflags, regs.rax) == (CODE + len(code), 2, VALUE)
    assert run(engine) == Halt()


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize(
    ("code", "size", "rax"),
    [
        (b"\x8a\x07", 1, 0xAAAA_AAAA_AAAA_AA88),
        (b"\x66\x8b\x07", 2, 0xAAAA_AAAA_AAAA_7788),
        (b"\x8b\x07", 4, 0x5566_7788),
        (b"\x48\x8b\x07", 8, VALUE),
        (b"\x0f\xb6\x07", 1, 0x88),
        (b"\x48\x0f\xbe\x07", 1, 0xFFFF_FFFF_FFFF_FF88),
    ],
    ids=["mov8", "mov16", "mov32", "mov64", "movzx", "movsx"],
)
def test_read(engine: UnicornEngine, memory: Memory, code: bytes, size: int, rax: int, offset: int) -> None:
    start(engine, memory, code, rax=0xAAAA_AAAA_AAAA_AAAA, rdi=MMIO + offset)
    assert run(engine) == Stage2Miss(MMIO + offset)
    before = engine.get_regs()
    assert engine.emulate_mmio(MMIO + offset, False) == MmioRead(MMIO + offset, size)
    assert engine.get_regs() == before
    engine.complete(VALUE)
    assert run(engine) == Halt()
    regs = engine.get_regs()
    assert (regs.rax, regs.rip) == (rax, CODE + len(code) + 1)


@pytest.mark.parametrize(
    ("code", "written", "rax"),
    [
        (b"\x83\x0f\x01", 0x5566_7789, 3),  # or dword [rdi], 1
        (b"\xf0\x83\x27\x0f", 0x8, 3),  # lock and dword [rdi], 15
        (b"\x87\x07", 3, 0x5566_7788),  # xchg [rdi], eax
        (b"\xf0\x0f\xc1\x07", 0x5566_778B, 0x5566_7788),  # lock xadd [rdi], eax
    ],
    ids=["or", "lock and", "xchg", "lock xadd"],
)
def test_read_and_write(engine: UnicornEngine, memory: Memory, code: bytes, written: int, rax: int) -> None:
    start(engine, memory, code, rax=3)
    assert to_the_end(engine, VALUE) == [MmioRead(MMIO, 4), MmioWrite(MMIO, 4, written), Halt()]
    assert engine.get_regs().rax == rax


def test_flags_of_a_comparison(engine: UnicornEngine, memory: Memory) -> None:
    start(engine, memory, b"\x83\x3f\x05")  # cmp dword [rdi], 5
    assert to_the_end(engine, 5) == [MmioRead(MMIO, 4), Halt()]
    assert engine.get_regs().rflags == 0x46  # ZF and PF


def test_rep_stos(engine: UnicornEngine, memory: Memory) -> None:
    start(engine, memory, b"\xf3\xab", rax=VALUE, rcx=3)
    stops = to_the_end(engine)
    assert stops == [*(MmioWrite(MMIO + i * 4, 4, VALUE & 0xFFFF_FFFF) for i in range(3)), Halt()]
    assert (engine.get_regs().rcx, engine.get_regs().rdi) == (0, MMIO + 12)


def test_rep_movs_to_the_device(engine: UnicornEngine, memory: Memory) -> None:
    memory.write(DATA, bytes(range(16)))
    start(engine, memory, b"\xf3\x48\xa5", rsi=DATA, rcx=2)
    words = (memory.word(DATA), memory.word(DATA + 8))
    assert to_the_end(engine) == [MmioWrite(MMIO, 8, words[0]), MmioWrite(MMIO + 8, 8, words[1]), Halt()]


def test_rep_movs_from_the_device(engine: UnicornEngine, memory: Memory) -> None:
    start(engine, memory, b"\xf3\xa5", rsi=MMIO, rdi=DATA, rcx=2)
    assert to_the_end(engine, 0x11, 0x22) == [MmioRead(MMIO, 4), MmioRead(MMIO + 4, 4), Halt()]
    assert memory.word(DATA) == 0x22_0000_0011


def test_movs_between_two_devices(engine: UnicornEngine, memory: Memory) -> None:
    start(engine, memory, b"\xa4", rsi=MMIO + PAGE + 1)
    assert to_the_end(engine, 0x99) == [MmioRead(MMIO + PAGE + 1, 1), MmioWrite(MMIO, 1, 0x99), Halt()]


def test_memory_beside_the_device_may_be_missing(engine: UnicornEngine, memory: Memory) -> None:
    """The device is read once, although the store after it has to be repeated."""
    memory.denied.add(DATA // PAGE)
    start(engine, memory, b"\xa5", rsi=MMIO, rdi=DATA)
    assert run(engine) == Stage2Miss(MMIO)
    assert engine.emulate_mmio(MMIO, False) == MmioRead(MMIO, 4)
    engine.complete(0x77)
    assert run(engine) == Stage2Miss(DATA, write=True)
    memory.denied.discard(DATA // PAGE)
    assert run(engine) == Halt()
    assert memory.word(DATA, 4) == 0x77


def test_sixteen_bytes_are_two_exits(engine: UnicornEngine, memory: Memory) -> None:
    start(engine, memory, b"\x0f\x10\x07\x0f\x11\x47\x20")  # movups xmm0, [rdi]; movups [rdi + 32], xmm0
    assert to_the_end(engine, 1, 2) == [
        MmioRead(MMIO, 8),
        MmioRead(MMIO + 8, 8),
        MmioWrite(MMIO + 32, 8, 1),
        MmioWrite(MMIO + 40, 8, 2),
        Halt(),
    ]


def test_push_and_call_on_a_stack_of_mmio(engine: UnicornEngine, memory: Memory) -> None:
    start(engine, memory, b"\x50", rsp=MMIO + 0x100, rax=VALUE)
    assert to_the_end(engine) == [MmioWrite(MMIO + 0xF8, 8, VALUE), Halt()]
    assert engine.get_regs().rsp == MMIO + 0xF8
    start(engine, memory, b"\xe8\x00\x00\x00\x00", rsp=MMIO + 0x100)
    assert to_the_end(engine) == [MmioWrite(MMIO + 0xF8, 8, CODE + 5), Halt()]


def test_outs_from_the_device(engine: UnicornEngine, memory: Memory) -> None:
    start(engine, memory, b"\x6e", rsi=MMIO, rdx=0x60)
    assert to_the_end(engine, 0x41) == [MmioRead(MMIO, 1), PortOut(0x60, 1, 0x41), Halt()]
    assert engine.get_regs().rsi == MMIO + 1


def test_read_only_memory(engine: UnicornEngine, memory: Memory) -> None:
    """A write to a read-only slot is MMIO; what is read comes from the memory."""
    memory.read_only.add(DATA // PAGE)
    memory.set_word(DATA, 0xF0)
    start(engine, memory, b"\x83\x0f\x01", rdi=DATA)  # or dword [rdi], 1
    assert run(engine) == Stage2Miss(DATA, write=True)
    assert engine.emulate_mmio(DATA, True) == MmioWrite(DATA, 4, 0xF1)
    assert run(engine) == Halt()
    assert memory.word(DATA) == 0xF0


def test_the_device_is_a_device_until_its_leaf_goes(engine: UnicornEngine, memory: Memory) -> None:
    start(engine, memory, b"\x89\x07\x89\x07\x89\x07", rax=7)
    assert run(engine) == Stage2Miss(MMIO, write=True)
    assert engine.emulate_mmio(MMIO, True) == MmioWrite(MMIO, 4, 7)
    assert run(engine) == MmioWrite(MMIO, 4, 7)
    assert memory.word(MMIO, 4) == 0
    memory.denied.clear()
    engine.flush_tlb()
    assert run(engine) == Halt()
    assert memory.word(MMIO, 4) == 7


def with_handler(engine: UnicornEngine, memory: Memory, vector: int, code: bytes) -> None:
    """A 64-bit interrupt gate to `code`."""
    memory.write(HANDLER, code)
    memory.write(IDT + vector * 16, (HANDLER | 8 << 16 | 0x8E << 40).to_bytes(16, "little"))
    sregs = engine.get_sregs()
    sregs.idt.base, sregs.idt.limit = IDT, 0xFFF
    engine.set_sregs(sregs)


def test_a_page_fault_of_the_instruction_comes_first(engine: UnicornEngine, memory: Memory) -> None:
    """movs from the device to nowhere: the answer is dropped with the instruction, and the handler asks anew."""
    start(engine, memory, b"\xa5", rsi=MMIO, rdi=1 << 46)
    with_handler(engine, memory, 14, b"\x8b\x06" + HLT)  # mov eax, [rsi]
    assert to_the_end(engine, 7, 8) == [MmioRead(MMIO, 4), MmioRead(MMIO, 4), Halt()]
    assert (engine.get_regs().rax, engine.get_sregs().cr2) == (8, 1 << 46)
    assert memory.word(STACK - 40) == CODE


@pytest.mark.parametrize(("edx_eax", "written"), [(VALUE, 0xAAAA_AAAA_BBBB_BBBB), (5, VALUE)])
def test_an_instruction_that_is_one_helper(engine: UnicornEngine, memory: Memory, edx_eax: int, written: int) -> None:
    """CMPXCHG8B reads, compares and writes in one go of native code; the read must not be answered by a guess."""
    low, high = (1 << 32) - 1, 32
    start(engine, memory, b"\x0f\xc7\x0f", rax=edx_eax & low, rdx=edx_eax >> high, rbx=0xBBBB_BBBB, rcx=0xAAAA_AAAA)
    assert run(engine) == Stage2Miss(MMIO)
    before = engine.get_regs()
    assert engine.emulate_mmio(MMIO, False) == MmioRead(MMIO, 8)
    assert engine.get_regs() == before
    engine.complete(VALUE)
    assert to_the_end(engine) == [MmioWrite(MMIO, 8, written), Halt()]
    regs = engine.get_regs()
    assert regs.rdx << high | regs.rax == VALUE


def test_setting_rip_abandons_the_instruction(engine: UnicornEngine, memory: Memory) -> None:
    start(engine, memory, b"\x8b\x07\xeb\xfc")  # mov eax, [rdi]; jmp back
    assert run(engine) == Stage2Miss(MMIO)
    assert engine.emulate_mmio(MMIO, False) == MmioRead(MMIO, 4)
    regs = engine.get_regs()
    regs.rip = CODE + 4
    engine.set_regs(regs)
    engine.complete(5)
    assert run(engine) == Halt()
    assert engine.get_regs().rax == 0


def test_guest_that_single_steps(engine: UnicornEngine, memory: Memory) -> None:
    """RFLAGS.TF of the guest stays, and its #DB comes after the write."""
    start(engine, memory, b"\x89\x07", rflags=0x102)
    with_handler(engine, memory, 1, HLT)
    assert to_the_end(engine) == [MmioWrite(MMIO, 4, 0), Halt()]
    assert [memory.word(STACK - 40 + i * 8) for i in range(3)] == [CODE + 2, 8, 0x102]


@pytest.mark.parametrize(
    ("code", "registers", "why"),
    [
        (b"\x48\x8b\x07", {"rdi": MMIO - 4}, "an access of two pages, one of which is MMIO"),
        (b"\x48\x89\x07", {"rdi": MMIO - 4}, "an access of two pages, one of which is MMIO"),
        (b"\x48\x8b\x07", {"rdi": MMIO + 2 * PAGE - 4}, "an access of two pages, one of which is MMIO"),
        (b"\x6c", {}, "INS to MMIO"),
    ],
)
def test_what_cannot_be_done(
    engine: UnicornEngine, memory: Memory, code: bytes, registers: dict[str, int], why: str
) -> None:
    start(engine, memory, code, **registers)
    assert to_the_end(engine) == [Failed(CODE, why)]


def test_fetch_from_mmio(engine: UnicornEngine, memory: Memory) -> None:
    start(engine, memory, b"\xff\xe7")  # jmp rdi
    assert run(engine) == Stage2Miss(MMIO, fetch=True)
    assert engine.emulate_mmio(MMIO, False) == Failed(MMIO, "a fetch, a page-table walk or a descriptor table in MMIO")


def test_page_tables_in_mmio(engine: UnicornEngine, memory: Memory) -> None:
    start(engine, memory, b"\x8b\x07")
    table = TABLES + 3 * PAGE
    memory.denied.add(table // PAGE)
    assert run(engine) == Stage2Miss(table)
    assert engine.emulate_mmio(table, False) == Failed(CODE, "a fetch, a page-table walk or a descriptor table in MMIO")


def test_stack_of_an_exception_in_mmio(engine: UnicornEngine, memory: Memory) -> None:
    start(engine, memory, b"\x0f\x0b", rsp=MMIO + 0x100)
    with_handler(engine, memory, 6, HLT)
    assert run(engine) == Stage2Miss(MMIO + 0xF8, write=True)
    assert isinstance(engine.emulate_mmio(MMIO + 0xF8, True), Failed)


def test_ports_and_devices_in_turn(engine: UnicornEngine, memory: Memory) -> None:
    start(engine, memory, b"\xe4\x60\x89\x07\xe6\x61")  # in al, 0x60; mov [rdi], eax; out 0x61, al
    assert run(engine) == PortIn(0x60, 1)
    engine.complete(0x42)
    assert to_the_end(engine) == [MmioWrite(MMIO, 4, 0x42), PortOut(0x61, 1, 0x42), Halt()]


def test_a_device_that_is_too_far(engine: UnicornEngine, memory: Memory) -> None:
    """Unicorn has 52 bits for host memory and devices together."""
    engine.set_cpuid({(0x8000_0008, 0): (57 << 8 | 52, 0, 0, 0)})
    start(engine, memory, b"\x8a\x07", rdi=DATA)
    far = 1 << 51 | MMIO
    memory.set_word(TABLES + 4 * PAGE + DATA // PAGE * 8, far | 0x67)
    assert run(engine) == Stage2Miss(far)
    assert engine.emulate_mmio(far, False) == Failed(CODE, "a device above 2^51")
