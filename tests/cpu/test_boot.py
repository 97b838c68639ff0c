"""ELF files made by hand, and the state that boot gives, run by an engine."""

from __future__ import annotations

import struct

import pytest

from guestmem.cpu import boot
from guestmem.cpu.engine import Halt, Stage2Miss
from guestmem.cpu.registers import Sregs
from guestmem.cpu.unicorn import UnicornEngine
from tests.cpu.guests import CODE, PAGE, SIZE, STACK, TABLES, Memory, run

HLT = b"\xf4"


def elf(
    *segments: tuple[int, int, bytes, int], entry: int = 0x400000, machine: int = 62, kind: int = 2, bits: int = 2
) -> bytes:
    """An ELF file of (physical address, virtual address, data, size in memory)."""
    header = b"\x7fELF" + bytes((bits, 1, 1)) + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", kind, machine, 1, entry, 64, 0, 0, 64, 56, len(segments), 64, 0, 0)
    offset = 64 + 56 * len(segments)
    table, body = b"", b""
    for physical, virtual, data, size in segments:
        table += struct.pack("<IIQQQQQQ", 1, 7, offset + len(body), virtual, physical, len(data), size, PAGE)
        body += data
    return header + table + body


def test_segments_go_to_their_physical_addresses(memory: Memory) -> None:
    memory.write(0x400000, b"\xff" * 64)
    image = elf(
        (0x400000, 0x400000, b"code", 8), (0x500000, 0xFFFF_FFFF_8000_0000, b"data", 4), entry=0xFFFF_FFFF_8000_0002
    )
    assert boot.load_elf(image, memory.write, SIZE) == 0x500002
    assert memory.read(0x400000, 9) == b"code\0\0\0\0\xff"
    assert memory.read(0x500000, 4) == b"data"


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"", "not an ELF file"),
        (b"MZ" + bytes(100), "not an ELF file"),
        (elf((0, 0, b"x", 1), machine=183), "wrong machine: ELF64 EM_AARCH64, need ELF64 EM_X86_64"),
        (elf((0, 0, b"x", 1), kind=1), "wrong type of file: ET_REL"),
        (elf(), "no segment to load"),
        (elf((SIZE - 1, 0x400000, b"x", 2)), r"segment 0xffffff to 0x1000001 outside memory of 0x1000000 bytes"),
        (elf((0, 0, b"x", 1)), "entry 0x400000 in no segment"),
    ],
)
def test_what_is_wrong_with_a_file(memory: Memory, image: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        boot.load_elf(image, memory.write, SIZE)


@pytest.mark.parametrize("page", [boot.PAGE_4K, boot.PAGE_2M])
def test_long_mode(engine: UnicornEngine, memory: Memory, page: int) -> None:
    """Code, stack and the last byte that is mapped can be used; what follows cannot."""
    mapped = 6 << 20
    memory.write(CODE, b"\x50\x8a\x07" + HLT)  # push rax; mov al, [rdi]; hlt
    memory.write(mapped - 1, b"\x77")
    start = boot.long_mode(CODE, STACK, TABLES, mapped, memory.write, page)
    start.regs.rdi = mapped - 1
    engine.set_sregs(start.sregs)
    engine.set_regs(start.regs)
    assert run(engine) == Halt()
    assert (engine.get_regs().rax, engine.get_regs().rsp) == (0x77, STACK - 8)
    engine.set_sregs(start.sregs)
    start.regs.rdi = mapped
    engine.set_regs(start.regs)
    assert type(run(engine)).__name__ == "Shutdown"
    assert engine.get_sregs().cr2 == mapped


@pytest.mark.parametrize("page", [boot.PAGE_4K, boot.PAGE_2M])
@pytest.mark.parametrize("mapped", [1, 2 << 20, 3 << 20, 1 << 30, (1 << 30) + 1])
def test_tables_size_is_what_is_written(page: int, mapped: int) -> None:
    written: dict[int, bytes] = {}
    boot.long_mode(0, 0, 0x10000, mapped, written.__setitem__, page)
    ends = [gpa + len(data) for gpa, data in written.items()]
    assert max(ends) == 0x10000 + boot.tables_size(mapped, page)
    assert sorted(written) == list(range(0x10000, 0x10000 + boot.tables_size(mapped, page), PAGE))


@pytest.mark.parametrize(
    ("tables", "mapped", "page", "message"),
    [
        (0x10, PAGE, boot.PAGE_4K, "not a multiple of 4 KiB"),
        (0, 0, boot.PAGE_4K, "bytes to map"),
        (0, 1 << 40, boot.PAGE_2M, "bytes to map"),
        (0, PAGE, 1 << 30, "page size"),
    ],
)
def test_what_long_mode_refuses(memory: Memory, tables: int, mapped: int, page: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        boot.long_mode(0, 0, tables, mapped, memory.write, page)


def test_real_mode(engine: UnicornEngine, memory: Memory) -> None:
    regs, sregs = boot.real_mode(0x7C00)
    assert (regs.rip, sregs.cs.base, sregs.cs.selector, sregs.cr0) == (0x7C00, 0, 0, Sregs().cr0)
    engine.set_sregs(sregs)
    engine.set_regs(regs)
    memory.denied.add(7)
    assert run(engine) == Stage2Miss(0x7C00, fetch=True)
    memory.denied.clear()
    memory.write(0x7C00, HLT)
    assert run(engine) == Halt()
    with pytest.raises(ValueError, match="beyond what IP can hold"):
        boot.real_mode(0x10000)
