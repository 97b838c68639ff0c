"""Guest memory in many mappings of the host that come and go."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator

import pytest

from guestmem.cpu.engine import Halt, HostWindow, PortOut, Stage2Miss, Stop, Translation
from guestmem.cpu.unicorn import UnicornEngine
from tests.cpu.guests import CODE, PAGE, Memory, run, start_long

FAR, HLT = 0x40_0000, b"\xf4"
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_MAP_FIXED_NOREPLACE = 0x100000


class Windows(Memory):
    """A memory whose pages from FAR on are each in a mapping of its own; `mapped` holds its address by frame."""

    def __init__(self) -> None:
        super().__init__()
        self.mapped: dict[int, int] = {}

    def translate(self, gpa: int, write: bool, private: bool | None) -> Translation | None:
        if gpa < FAR or gpa >= self.window.size:
            return super().translate(gpa, write, private)
        base = self.mapped.get(gpa // PAGE)
        return None if base is None else Translation(base, True, HostWindow(base, PAGE))

    def map(self, gpa: int, data: bytes, address: int = 0) -> int:
        """A memfd of one page with `data`, mapped at `address` or anywhere."""
        fd = os.memfd_create("window")
        os.pwrite(fd, data.ljust(PAGE, b"\0"), 0)
        flags = mmap.MAP_SHARED | (_MAP_FIXED_NOREPLACE if address else 0)
        base = _libc.mmap(address or None, PAGE, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, 0)
        os.close(fd)
        assert base == address or not address
        self.mapped[gpa // PAGE] = base
        return int(base)

    def unmap(self, gpa: int) -> int:
        base = self.mapped.pop(gpa // PAGE)
        assert _libc.munmap(base, PAGE) == 0
        return base

    def close(self) -> None:
        for frame in list(self.mapped):
            self.unmap(frame * PAGE)
        super().close()


@pytest.fixture
def windows() -> Iterator[Windows]:
    windows = Windows()
    yield windows
    windows.close()


@pytest.fixture
def engine(windows: Windows) -> Iterator[UnicornEngine]:
    engine = UnicornEngine(windows)
    yield engine
    engine.close()


def go(engine: UnicornEngine, rip: int = CODE, **registers: int) -> Stop:
    regs = engine.get_regs()
    for name, value in (registers | {"rip": rip}).items():
        setattr(regs, name, value)
    engine.set_regs(regs)
    return run(engine)


def test_thousands(engine: UnicornEngine, windows: Windows) -> None:
    """1: add rax, [rdi]; mov [rdi + 8], rax; add rdi, 4096; dec rcx; jnz 1b; hlt"""
    pages = 3000
    for i in range(pages):
        windows.map(FAR + i * PAGE, i.to_bytes(8, "little"))
    code = b"\x48\x03\x07\x48\x89\x47\x08\x48\x81\xc7\x00\x10\x00\x00\x48\xff\xc9\x75\xed" + HLT
    start_long(engine, windows, code)
    assert go(engine, rax=0, rdi=FAR, rcx=pages) == Halt()
    assert engine.get_regs().rax == pages * (pages - 1) // 2
    for i in (0, 1, pages - 1):
        assert ctypes.c_uint64.from_address(windows.mapped[FAR // PAGE + i] + 8).value == i * (i + 1) // 2


def test_data_of_another_memory_at_the_same_address(engine: UnicornEngine, windows: Windows) -> None:
    start_long(engine, windows, b"\x8a\x07\xe6\x80" + HLT)  # mov al, [rdi]; out 0x80, al
    for value in range(1, 6):
        base = windows.map(FAR, bytes((value,)), windows.unmap(FAR) if value > 1 else 0)
        assert go(engine, rdi=FAR) == PortOut(0x80, 1, value)
        assert windows.mapped[FAR // PAGE] == base
        engine.flush_tlb()


def test_code_of_another_memory_at_the_same_address(engine: UnicornEngine, windows: Windows) -> None:
    start_long(engine, windows, HLT)
    for value in range(1, 6):
        code = bytes((0xB0, value)) + b"\xe6\x80" + HLT  # mov al, value; out 0x80, al
        windows.map(FAR, code, windows.unmap(FAR) if value > 1 else 0)
        for _ in range(2):
            assert go(engine, FAR) == PortOut(0x80, 1, value)
        engine.flush_tlb()


def test_the_same_code_at_another_address(engine: UnicornEngine, windows: Windows) -> None:
    """Between the two nothing is mapped where the first was; the guest is elsewhere meanwhile."""
    start_long(engine, windows, b"\xe6\x81" + HLT)
    windows.map(FAR, b"\xb0\x01\xe6\x80")
    assert go(engine, FAR) == PortOut(0x80, 1, 1)
    engine.flush_tlb()
    windows.unmap(FAR)
    for _ in range(3):
        assert go(engine) == PortOut(0x81, 1, 1)
    assert go(engine, FAR) == Stage2Miss(FAR, fetch=True)
    windows.map(FAR, b"\xb0\x02\xe6\x80")
    assert go(engine, FAR) == PortOut(0x80, 1, 2)


def test_page_tables_in_a_window(engine: UnicornEngine, windows: Windows) -> None:
    """CR3 names a page of a window, which goes away and comes back with other entries."""
    start_long(engine, windows, b"\x8a\x07\xe6\x80" + HLT)
    sregs = engine.get_sregs()
    root = windows.read(sregs.cr3, PAGE)
    sregs.cr3 = FAR
    for present in (True, False, True):
        windows.map(FAR, root if present else bytes(PAGE), windows.unmap(FAR) if FAR // PAGE in windows.mapped else 0)
        engine.flush_tlb()
        engine.set_sregs(sregs)
        stop = go(engine, rdi=CODE)
        assert (stop == PortOut(0x80, 1, 0x8A)) is present


def test_many_generations_leave_nothing(engine: UnicornEngine, windows: Windows) -> None:
    start_long(engine, windows, b"\xff\xd7\xe6\x80")  # call rdi; out 0x80, al
    for i in range(300):
        gpa = FAR + i % 7 * PAGE
        windows.map(gpa, bytes((0xB0, i & 0xFF, 0xC3)))  # mov al, i; ret
        assert go(engine, rdi=gpa, rsp=0x8000) == PortOut(0x80, 1, i & 0xFF)
        engine.flush_tlb()
        windows.unmap(gpa)
