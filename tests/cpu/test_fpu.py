"""FPU and SSE state: images against what the guest's own FXSAVE and instructions say."""

from __future__ import annotations

import random

import pytest

from guestmem.cpu.block_state import AREA
from guestmem.cpu.engine import Halt, PortOut
from guestmem.cpu.unicorn import UnicornEngine
from tests.cpu.guests import DATA, Memory, run, start_long

HLT = b"\xf4"
FXSAVE = b"\x48\x0f\xae\x07"  # fxsave64 [rdi]
FXRSTOR = b"\x48\x0f\xae\x0f"
DEFINED = 32 + 128 + 256


def start(engine: UnicornEngine, memory: Memory, code: bytes) -> None:
    start_long(engine, memory, code)
    regs = engine.get_regs()
    regs.rdi = DATA
    engine.set_regs(regs)


def an_image(seed: int = 1) -> bytes:
    """Random registers, a valid control word, top of stack 5, some registers empty."""
    chance = random.Random(seed)
    image = bytearray(512)
    image[:6] = (0x27F | 0x400).to_bytes(2, "little") + (5 << 11 | 0x100).to_bytes(2, "little") + b"\xb4\0"
    image[24:32] = (0x9FC0).to_bytes(4, "little") + (0xFFFF).to_bytes(4, "little")
    for i in range(8):
        image[32 + i * 16 : 42 + i * 16] = chance.randbytes(7) + b"\x80" + (0x3FFF + i).to_bytes(2, "little")
    image[160:416] = chance.randbytes(256)
    return bytes(image)


def test_after_reset(engine: UnicornEngine) -> None:
    image = engine.get_fpu()
    assert (image[:2], image[2:6], image[24:28]) == (b"\x7f\x03", bytes(4), b"\x80\x1f\0\0")
    assert not any(image[160:])


def test_round_trip(engine: UnicornEngine) -> None:
    image = bytearray(an_image())
    image[6:24] = bytes(range(1, 19))
    engine.set_fpu(bytes(image))
    assert engine.get_fpu() == image


def test_the_guest_stores_what_was_set(engine: UnicornEngine, memory: Memory) -> None:
    start(engine, memory, FXSAVE + HLT)
    engine.set_fpu(an_image())
    assert run(engine) == Halt()
    assert memory.read(DATA, DEFINED) == an_image()[:DEFINED]


def test_what_the_guest_loads_is_got(engine: UnicornEngine, memory: Memory) -> None:
    memory.write(DATA, an_image(2))
    start(engine, memory, FXRSTOR + HLT)
    assert run(engine) == Halt()
    assert engine.get_fpu() == an_image(2)


def test_the_guest_computes_with_it(engine: UnicornEngine, memory: Memory) -> None:
    """paddq xmm1, xmm15; movq rax, xmm1; out; and the rounding mode of x87: fld qword [rdi]; fistp dword [rdi]."""
    code = b"\x66\x41\x0f\xd4\xcf\x66\x48\x0f\x7e\xc8\xe7\x80" + b"\xdd\x07\xdb\x1f" + HLT
    start(engine, memory, code)
    image = bytearray(engine.get_fpu())
    image[:2] = (0x37F | 0x800).to_bytes(2, "little")  # round up
    image[160 + 16 : 160 + 24] = (40).to_bytes(8, "little")
    image[160 + 240 : 160 + 248] = (2).to_bytes(8, "little")
    engine.set_fpu(bytes(image))
    memory.write(DATA, b"\0\0\0\0\0\0\xf4\x3f")  # 1.25
    assert run(engine) == PortOut(0x80, 4, 42)
    assert run(engine) == Halt()
    assert memory.word(DATA, 4) == 2


def test_area_of_xsave(engine: UnicornEngine) -> None:
    engine.set_fpu(an_image())
    area = engine.get_xsave()
    assert (len(area), area[:512], area[512]) == (AREA, an_image(), 3)
    engine.set_fpu(bytes(512))
    engine.set_xsave(area.ljust(4096, b"\0"))
    assert engine.get_xsave() == area


@pytest.mark.parametrize(("present", "kept"), [(1, slice(0, 24)), (2, slice(160, 416))])
def test_what_the_area_has_not_is_reset(engine: UnicornEngine, present: int, kept: slice) -> None:
    initial = engine.get_fpu()
    expected = bytearray(initial)
    expected[kept] = an_image()[kept]
    expected[24:32] = an_image()[24:32]
    if present == 1:
        expected[32:160] = an_image()[32:160]
    engine.set_xsave(an_image() + bytes((present,)).ljust(64, b"\0"))
    assert engine.get_fpu() == expected


@pytest.mark.parametrize(
    ("area", "why"),
    [
        (bytes(575), "575 bytes"),
        (bytes(512) + b"\x04".ljust(64, b"\0"), "XSTATE_BV 0x4"),
        (bytes(519) + b"\x80".ljust(64, b"\0"), "XSTATE_BV 0x8000000000000000"),
        (bytes(520) + b"\x01".ljust(56, b"\0"), "XCOMP_BV 0x1"),
        (bytes(26) + b"\x01" + bytes(485) + b"\x03".ljust(64, b"\0"), "MXCSR 0x10000"),
    ],
)
def test_areas_that_are_refused(engine: UnicornEngine, area: bytes, why: str) -> None:
    before = engine.get_fpu()
    with pytest.raises(ValueError, match=why):
        engine.set_xsave(area)
    assert engine.get_fpu() == before


def test_short_image(engine: UnicornEngine) -> None:
    with pytest.raises(ValueError, match="511 bytes"):
        engine.set_fpu(bytes(511))


def test_xcr0(engine: UnicornEngine, memory: Memory) -> None:
    assert engine.get_xcr0() == 1
    engine.set_xcr0(3)
    start(engine, memory, b"\x31\xc9\x0f\x01\xd0\xe6\x80" + HLT)  # xor ecx, ecx; xgetbv; out
    sregs = engine.get_sregs()
    sregs.cr4 |= 1 << 18
    engine.set_sregs(sregs)
    assert run(engine) == PortOut(0x80, 1, 3)
    for wrong in (0, 2, 7):
        with pytest.raises(ValueError, match=f"XCR0 {wrong:#x}"):
            engine.set_xcr0(wrong)
    assert engine.get_xcr0() == 3
