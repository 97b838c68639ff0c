"""The usual forms of instructions with memory operands: each leaves the same state in four situations.

All memory there, which is the reference; pages that come in one by one, as stage 2 misses them, with the operand across
a page border; the same with every page that the guest has taken away again at each miss; and a device in the place of
the memory, which is asked for each access.
"""

from __future__ import annotations

import pytest

from guestmem.cpu.engine import Halt, MmioRead, MmioWrite, Stage2Miss
from guestmem.cpu.registers import Regs
from guestmem.cpu.unicorn import UnicornEngine
from tests.cpu.guests import CODE, PAGE, STACK, Memory, assemble, run, start_long

SOURCE, TARGET = 0x20000, 0x30000
AREA = 2 * PAGE
IN_ONE_PAGE, ACROSS = 0x100, PAGE - 3

FORMS = """
mov [rdi], al | mov [rdi], rax | mov dword ptr [rdi], 0x12345678 | mov rbx, [rdi] | movzx ebx, byte ptr [rdi]
movsx rbx, word ptr [rdi] | movsxd rbx, dword ptr [rdi] | movbe ebx, [rdi] | movbe [rdi], ebx
add [rdi], rax | adc dword ptr [rdi], 5 | sub [rdi], al | sbb rbx, [rdi] | and byte ptr [rdi], 0x0f | or [rdi], eax
xor word ptr [rdi], 0x5555 | cmp [rdi], rax | cmp byte ptr [rdi], 7 | test [rdi], ebx | test byte ptr [rdi], 1
inc qword ptr [rdi] | dec byte ptr [rdi] | neg dword ptr [rdi] | not word ptr [rdi] | imul rbx, [rdi], 3
shl qword ptr [rdi], 3 | rol dword ptr [rdi], cl | sar byte ptr [rdi], 1 | shld [rdi], rax, 5 | mul dword ptr [rdi]
bts dword ptr [rdi], 5 | btc word ptr [rdi], 3 | bt qword ptr [rdi], 9 | bt [rdi], rcx | bts [rdi], ecx
lock add [rdi], rax | lock bts dword ptr [rdi], 4 | lock btc dword ptr [rdi], 4 | lock inc byte ptr [rdi]
lock xadd [rdi], rax | xchg [rdi], rax | xchg [rdi], bl | lock or dword ptr [rdi], 1 | lock dec qword ptr [rdi]
cmpxchg [rdi], rbx | lock cmpxchg [rdi], ebx | mov rax, [rdi]; lock cmpxchg [rdi], rbx | lock cmpxchg8b [rdi]
cmove rbx, [rdi] | setnz [rdi] | push qword ptr [rdi]; pop rbx | push rax; pop qword ptr [rdi]
movsb | movsq | stosd | lodsw | scasb | cmpsq | std; movsw; cld
rep movsb | rep movsq | rep stosb | rep stosq | repne scasb | repe cmpsb | rep lodsd
movups xmm0, [rsi]; movups [rdi], xmm0 | movdqu xmm1, [rdi]; movq rbx, xmm1
movsd xmm0, qword ptr [rsi]; movsd [rdi], xmm0
movd xmm0, dword ptr [rsi]; paddb xmm0, xmm0; movd [rdi], xmm0 | movss xmm2, dword ptr [rdi]; cvttss2si ebx, xmm2
popcnt rbx, [rdi] | bsf rbx, [rdi] | crc32 ebx, dword ptr [rdi] | xlatb | movnti [rdi], rax | movhps [rdi], xmm0
call 1f; jmp 2f; 1: mov rbx, [rdi]; ret; 2: nop | lea rbx, [rdi + rax * 4]; mov ecx, [rdi]
fld qword ptr [rdi]; fstp qword ptr [rdi]
"""
ALL = [form.strip() for line in FORMS.strip().splitlines() for form in line.split("|")]


def registers(offset: int, form: str) -> Regs:
    count = 9 if form.startswith("rep") else 0x23
    regs = Regs(rip=CODE, rsp=STACK, rax=0x1122_3344_5566_7788, rbx=0xA5, rcx=count, rdx=0x77, rflags=0x203)
    regs.rsi, regs.rdi = SOURCE + offset, TARGET + offset
    if form == "xlatb":
        regs.rax, regs.rbx = 5, TARGET + offset
    return regs


def prepare(engine: UnicornEngine, memory: Memory, form: str, offset: int) -> None:
    start_long(engine, memory, assemble(form + "\nhlt"))
    memory.write(SOURCE, bytes(i * 7 & 0xFF for i in range(AREA)))
    memory.write(TARGET, bytes(i * 11 + 3 & 0xFF for i in range(AREA)))
    engine.set_regs(registers(offset, form))


def state(engine: UnicornEngine, memory: Memory) -> tuple[Regs, bytes, bytes]:
    return engine.get_regs(), engine.get_fpu(), memory.read(SOURCE, AREA) + memory.read(TARGET, AREA)


def reference(memory: Memory, form: str, offset: int) -> tuple[Regs, bytes, bytes]:
    engine = UnicornEngine(memory)
    prepare(engine, memory, form, offset)
    memory.denied.clear()
    assert run(engine) == Halt()
    result = state(engine, memory)
    engine.close()
    return result


@pytest.mark.parametrize("form", ALL)
def test_pages_that_come_in_one_by_one(engine: UnicornEngine, memory: Memory, form: str) -> None:
    expected = reference(memory, form, ACROSS)
    prepare(engine, memory, form, ACROSS)
    memory.denied.update(base // PAGE + i for base in (SOURCE, TARGET) for i in range(2))
    misses = 0
    while isinstance(stop := run(engine), Stage2Miss):
        memory.denied.remove(stop.gpa // PAGE)
        misses += 1
    assert stop == Halt()
    assert misses >= 1
    assert state(engine, memory) == expected


@pytest.mark.parametrize("form", ALL)
def test_translations_that_never_last(engine: UnicornEngine, memory: Memory, form: str) -> None:
    """At each miss all translations are forgotten, also of code, stack and page tables."""
    expected = reference(memory, form, ACROSS)
    prepare(engine, memory, form, ACROSS)
    pages = {base // PAGE + i for base in (SOURCE, TARGET) for i in range(2)} | {CODE // PAGE, STACK // PAGE - 1}
    memory.denied.update(pages)
    while isinstance(stop := run(engine), Stage2Miss):
        memory.denied.remove(stop.gpa // PAGE)
        engine.flush_tlb()
    assert stop == Halt()
    assert state(engine, memory) == expected


@pytest.mark.parametrize("form", ALL)
def test_a_device_in_the_place_of_memory(engine: UnicornEngine, memory: Memory, form: str) -> None:
    expected = reference(memory, form, IN_ONE_PAGE)
    prepare(engine, memory, form, IN_ONE_PAGE)
    device = bytearray(memory.read(TARGET, AREA))
    memory.denied.update((TARGET // PAGE, TARGET // PAGE + 1))
    accesses = 0
    while (stop := run(engine)) != Halt():
        if isinstance(stop, Stage2Miss):
            stop = engine.emulate_mmio(stop.gpa, stop.write)
        if isinstance(stop, MmioRead):
            engine.complete(int.from_bytes(device[stop.gpa - TARGET :][: stop.size], "little"))
        elif isinstance(stop, MmioWrite):
            device[stop.gpa - TARGET : stop.gpa - TARGET + stop.size] = stop.value.to_bytes(stop.size, "little")
        elif stop == Halt():
            break
        accesses += 1
    assert accesses >= 1 or "[rsi]" in form or "lods" in form
    memory.write(TARGET, bytes(device))
    assert state(engine, memory) == expected
