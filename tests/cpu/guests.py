"""Guests of a few instructions and a memory to run them in.

`Memory` is a fake of GuestMemory with two fields that tests change: the pages that stage 2 refuses altogether, and
those that it refuses to have written. The core cases are bytes, so that they run where there is no assembler.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from guestmem.cpu import boot
from guestmem.cpu.engine import Engine, HostWindow, PageBit, SliceOver, Stop, Translation

PAGE = 4096
SIZE = 16 << 20
DB, BP, UD, GP, PF, VC = 1, 3, 6, 13, 14, 29
CODE, DATA, STACK, TABLES = 0x1000, 0x5000, 0x8000, 0x100000


class Memory:
    """16 MiB at guest-physical 0 in a memfd; `denied` and `read_only` hold guest frame numbers."""

    def __init__(self, size: int = SIZE, page_bit: PageBit | None = None) -> None:
        self.page_bit = page_bit
        self._fd = os.memfd_create("guest")
        os.ftruncate(self._fd, size)
        self.bytes = mmap.mmap(self._fd, size)
        self._view = ctypes.c_char.from_buffer(self.bytes)
        self.window = HostWindow(ctypes.addressof(self._view), size)
        self.denied: set[int] = set()
        self.read_only: set[int] = set()
        self.asked: list[tuple[int, bool, bool | None]] = []

    def translate(self, gpa: int, write: bool, private: bool | None) -> Translation | None:
        self.asked.append((gpa, write, private))
        frame = gpa // PAGE
        if gpa >= self.window.size or frame in self.denied or (write and frame in self.read_only):
            return None
        return Translation(self.window.base + gpa, frame not in self.read_only, self.window)

    def write(self, gpa: int, data: bytes) -> None:
        self.bytes[gpa : gpa + len(data)] = data

    def read(self, gpa: int, size: int) -> bytes:
        return self.bytes[gpa : gpa + size]

    def word(self, gpa: int, size: int = 8) -> int:
        return int.from_bytes(self.read(gpa, size), "little")

    def set_word(self, gpa: int, value: int, size: int = 8) -> None:
        self.write(gpa, value.to_bytes(size, "little"))

    def close(self) -> None:
        del self._view
        self.bytes.close()
        os.close(self._fd)


def start_real(engine: Engine, memory: Memory, code: bytes, address: int = CODE) -> None:
    """16-bit code at `address`, segments based at 0, SP at STACK."""
    memory.write(address, code)
    regs, sregs = boot.real_mode(address)
    regs.rsp = STACK
    engine.set_sregs(sregs)
    engine.set_regs(regs)


def start_long(engine: Engine, memory: Memory, code: bytes, address: int = CODE, page: int = boot.PAGE_4K) -> None:
    """64-bit code at `address` in ring 0, all of memory mapped to itself, for ring 3 too; RSP at STACK."""
    memory.write(address, code)
    regs, sregs = boot.long_mode(address, STACK, TABLES, SIZE, memory.write, page, user=True)
    engine.set_sregs(sregs)
    engine.set_regs(regs)


def run(engine: Engine, slices: int = 1000) -> Stop:
    """Run to a stop that is not the end of a slice."""
    for _ in range(slices):
        stop = engine.run()
        if not isinstance(stop, SliceOver):
            return stop
    raise AssertionError(f"no stop in {slices} slices")


def assemble(source: str, bits: int = 64, address: int = CODE) -> bytes:
    """GNU assembler, Intel syntax. Skips the test where there is none."""
    if not (shutil.which("as") and shutil.which("ld")):
        pytest.skip("no assembler: as and ld from binutils are needed")
    with tempfile.TemporaryDirectory() as folder:
        obj, out = Path(folder, "a.o"), Path(folder, "a.bin")
        text = f".intel_syntax noprefix\n.code{bits}\n{source}\n"
        subprocess.run(["as", "-o", obj, "-"], input=text.encode(), check=True)
        link = ["ld", "-m", "elf_x86_64", f"-Ttext={address:#x}", "--oformat", "binary", "-e", "0"]
        subprocess.run([*link, "-o", str(out), str(obj)], check=True)
        return out.read_bytes()
