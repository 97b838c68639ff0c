"""Memory behind a leaf that the host refuses to have touched: an exact stop, and the process lives."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time

import pytest

from guestmem.cpu.engine import Halt, HostFault, MmioRead, PortOut, SliceOver, Translation
from guestmem.cpu.registers import DescriptorTable, Regs
from guestmem.cpu.unicorn import UnicornEngine
from tests.cpu.guests import CODE, PAGE, SIZE, TABLES, Memory, assemble, run, start_long

FAR = 0x400000
HLT = b"\xf4"
_libc = ctypes.CDLL(None, use_errno=True)


class Fragile(Memory):
    """From FAR on, guest memory is a file of its own, which is cut and grown again."""

    def __init__(self) -> None:
        super().__init__()
        self._far = os.memfd_create("far")
        os.ftruncate(self._far, 16 * PAGE)
        self.far = mmap.mmap(self._far, 16 * PAGE)
        self._far_view = ctypes.c_char.from_buffer(self.far)
        self.base = ctypes.addressof(self._far_view)

    def translate(self, gpa: int, write: bool, private: bool | None) -> Translation | None:
        if FAR <= gpa < FAR + 16 * PAGE:
            return Translation(self.base + gpa - FAR, True, self.window)
        return super().translate(gpa, write, private)

    def cut(self, pages: int = 0) -> None:
        os.ftruncate(self._far, pages * PAGE)

    def grow(self) -> None:
        os.ftruncate(self._far, 16 * PAGE)

    def protect(self, how: int) -> None:
        assert _libc.mprotect(ctypes.c_void_p(self.base), 16 * PAGE, how) == 0

    def close(self) -> None:
        del self._far_view
        self.far.close()
        os.close(self._far)
        super().close()


@pytest.fixture
def memory() -> object:
    memory = Fragile()
    yield memory
    memory.close()


def begin(engine: UnicornEngine, memory: Memory, code: bytes, **registers: int) -> None:
    start_long(engine, memory, code)
    regs = engine.get_regs()
    for name, value in registers.items():
        setattr(regs, name, value)
    engine.set_regs(regs)


ACCESSES = {
    "load": ("mov rax, [rdi + 8]", 8, False),
    "store": ("mov [rdi + 8], rax", 8, True),
    "inc": ("inc qword ptr [rdi + 8]", 8, None),
    "lock inc": ("lock inc qword ptr [rdi + 8]", 8, None),
    "byte": ("mov [rdi + 0xfff], al", 0xFFF, True),
    "push": ("lea rsp, [rdi + 16]; push rax", 8, True),
    "cmpxchg16b": ("lock cmpxchg16b [rdi + 16]", None, None),
    "fxsave": ("fxsave64 [rdi + 16]", None, True),
    "sse": ("movups xmm0, [rdi + 8]", None, False),
    "string": ("mov rsi, rdi; mov rdi, 0x5000; mov ecx, 4; rep movsb", 0, False),
    "crossing": ("mov rax, [rdi - 3]", None, False),
}


@pytest.mark.parametrize("warm", [False, True], ids=["first touch", "in the TLB"])
@pytest.mark.parametrize("name", ACCESSES)
def test_access(engine: UnicornEngine, memory: Fragile, name: str, warm: bool) -> None:
    """Registers are those before the instruction; with the memory back it is repeated, and is done once."""
    source, offset, write = ACCESSES[name]
    *before, last = source.split(";")
    start = assemble("\n".join(before))
    code = start + assemble(last) + HLT
    begin(engine, memory, code, rdi=FAR)
    if warm:
        assert run(engine) == Halt()
    memory.cut()
    begin(engine, memory, code, rdi=FAR) if not warm else engine.set_regs(_at_start(engine, rdi=FAR))
    stop = run(engine)
    assert isinstance(stop, HostFault)
    assert engine.get_regs().rip == CODE + len(start)
    if offset is not None:
        assert (stop.gpa, stop.hva) == (FAR + offset, memory.base + offset)
    assert stop.gpa - FAR == stop.hva - memory.base
    if write is not None:
        assert stop.write is write
    assert run(engine) == stop
    memory.grow()
    assert run(engine) == Halt()


def _at_start(engine: UnicornEngine, **registers: int) -> Regs:
    regs = engine.get_regs()
    regs.rip = CODE
    for name, value in registers.items():
        setattr(regs, name, value)
    return regs


def test_inc_happens_once(engine: UnicornEngine, memory: Fragile) -> None:
    begin(engine, memory, assemble("inc qword ptr [rdi]; inc qword ptr [rdi]") + HLT, rdi=FAR)
    assert run(engine) == Halt()
    memory.cut()
    engine.set_regs(_at_start(engine))
    assert isinstance(run(engine), HostFault)
    memory.grow()
    assert run(engine) == Halt()
    assert int.from_bytes(memory.far[:8], "little") == 2


def test_memory_that_may_only_be_read(engine: UnicornEngine, memory: Fragile) -> None:
    begin(engine, memory, assemble("mov rax, [rdi]; mov [rdi], rax") + HLT, rdi=FAR)
    memory.protect(mmap.PROT_READ)
    assert run(engine) == HostFault(memory.base, FAR, True)
    memory.protect(mmap.PROT_READ | mmap.PROT_WRITE)
    assert run(engine) == Halt()


def test_instruction_that_uses_mmio_as_well(engine: UnicornEngine, memory: Fragile) -> None:
    """The device is read once; the fault is at the store, which happens with the value when the memory is back."""
    device = 0x200000
    memory.denied.add(device // PAGE)
    begin(engine, memory, b"\xa5" + HLT, rsi=device + 8, rdi=FAR + 16)  # movsd
    memory.cut()
    run(engine)
    assert engine.emulate_mmio(device + 8, False) == MmioRead(device + 8, 4)
    engine.complete(0x1111)
    assert run(engine) == HostFault(memory.base + 16, FAR + 16, True)
    memory.grow()
    assert run(engine) == Halt()
    assert memory.far[16:20] == b"\x11\x11\0\0"


def test_fetch(engine: UnicornEngine, memory: Fragile) -> None:
    start_long(engine, memory, b"\xff\xd7\xe6\x80")  # call rdi; out 0x80, al
    memory.far[:3] = b"\xb0\x07\xc3"
    regs = engine.get_regs()
    regs.rdi = FAR
    engine.set_regs(regs)
    memory.cut()
    stop = run(engine)
    assert isinstance(stop, HostFault) and stop.gpa & -PAGE == FAR and not stop.write
    assert engine.get_regs().rip == FAR
    memory.grow()
    memory.far[:3] = b"\xb0\x07\xc3"
    assert run(engine) == PortOut(0x80, 1, 7)


def test_page_table(engine: UnicornEngine, memory: Fragile) -> None:
    begin(engine, memory, b"\x8a\x07" + HLT, rdi=0x600000)  # mov al, [rdi]
    memory.set_word(TABLES + 3 * PAGE + 3 * 8, FAR | 7)  # the table of 6M to 8M
    memory.cut()
    assert run(engine) == HostFault(memory.base, FAR, False)
    memory.grow()
    memory.far[:8] = (0x5000 | 7).to_bytes(8, "little")
    assert run(engine) == Halt()
    assert memory.far[0] & 0x20


def test_frame_of_an_exception(engine: UnicornEngine, memory: Fragile) -> None:
    begin(engine, memory, b"\x0f\x0b", rsp=FAR + 0x100)  # ud2
    memory.write(0x6000 + 6 * 16, (0x7000 & 0xFFFF | 8 << 16 | 0x8E << 40).to_bytes(16, "little"))
    memory.write(0x7000, HLT)
    sregs = engine.get_sregs()
    sregs.idt = DescriptorTable(0x6000, 0xFFF)
    engine.set_sregs(sregs)
    memory.cut()
    stop = run(engine)
    assert stop == HostFault(memory.base + 0xF8, FAR + 0xF8, True)
    memory.grow()
    assert run(engine) == Halt()
    assert engine.get_regs().rip == 0x7001
    assert int.from_bytes(memory.far[0xD8:0xE0], "little") == CODE


def test_cut_and_grown_under_a_running_guest(engine: UnicornEngine, memory: Fragile) -> None:
    """Two counters: every stop is at one of the two instructions, with the address of it."""
    code = assemble("1: inc qword ptr [rbx]; inc qword ptr [rbx + 8]; jmp 1b")
    begin(engine, memory, code, rbx=FAR)
    end = time.monotonic() + 1.5

    def cut_and_grow() -> None:
        while time.monotonic() < end:
            memory.cut()
            time.sleep(5e-5)
            memory.grow()
            time.sleep(3e-4)

    thread = threading.Thread(target=cut_and_grow)
    thread.start()
    stops = 0
    while thread.is_alive():
        stop = engine.run()
        if isinstance(stop, SliceOver):
            continue
        offset = {CODE: 0, CODE + 3: 8}[engine.get_regs().rip]
        assert isinstance(stop, HostFault)
        assert (stop.gpa, stop.hva) == (FAR + offset, memory.base + offset)
        stops += 1
    thread.join()
    assert stops > 100
    assert SIZE > FAR
