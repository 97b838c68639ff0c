"""A guest of SNP or TDX, or of neither, with handlers for the exceptions that its instructions raise."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from guestmem.cpu.engine import PageBit, PortOut, Stop
from guestmem.cpu.unicorn import UnicornEngine
from tests.cpu.guests import CODE, DB, GP, PAGE, PF, STACK, TABLES, UD, VC, Memory, run, start_long

HLT = b"\xf4"
VMCALL, VMMCALL = b"\x0f\x01\xc1", b"\x0f\x01\xd9"
PVALIDATE, RMPADJUST, TDCALL = b"\xf2\x0f\x01\xff", b"\xf3\x0f\x01\xfe", b"\x66\x0f\x01\xcc"
VMGEXIT, VMGEXIT_REPNE = b"\xf3\x0f\x01\xd9", b"\xf2\x0f\x01\xd9"
C_BIT, SHARED_BIT = PageBit(51, set_is_private=True), PageBit(47, set_is_private=False)
IDT, HANDLERS, TSS = 0x9000, 0xA000, 0xB000
FRAME_BYTES = 6 * 8  # with an error code


class Guest:
    """A guest of one kind in 64-bit ring 0 with `code` at CODE, its data pages mapped as private.

    The handler of vector n is an OUT of n to port n.
    """

    def __init__(self, bit: PageBit | None, code: bytes) -> None:
        self.memory = Memory(page_bit=bit)
        self.engine = UnicornEngine(self.memory)
        start_long(self.engine, self.memory, code + HLT)
        for page in range(1, 32):
            self.map(page * PAGE, private=True)
        for vector in (UD, DB, GP, PF, VC):
            handler = HANDLERS + vector * 16
            self.memory.write(handler, bytes((0xB0, vector, 0xE6, vector)))  # mov al, n; out n, al
            self.memory.set_word(IDT + vector * 16, handler & 0xFFFF | 8 << 16 | 0x8E << 40 | handler >> 16 << 48)
        sregs = self.engine.get_sregs()
        sregs.idt.base, sregs.idt.limit = IDT, 0xFFF
        sregs.tr.base, sregs.tr.limit = TSS, 0x67
        self.memory.set_word(TSS + 4, STACK)  # RSP0
        self.engine.set_sregs(sregs)

    def map(self, gpa: int, private: bool, present: bool = True) -> None:
        """The leaf of a page, which start_long maps to itself."""
        place = TABLES + 4 * PAGE + gpa // PAGE * 8
        bit = self.memory.page_bit
        mask = 1 << bit.position if bit else 0
        value = self.memory.word(place) & ~mask & ~1 | (1 if present else 0)
        self.memory.set_word(place, value | (mask if bit and private is bit.set_is_private else 0))
        self.engine.flush_tlb()

    def set(self, **registers: int) -> None:
        regs = self.engine.get_regs()
        for name, value in registers.items():
            setattr(regs, name, value)
        self.engine.set_regs(regs)

    def ring_3(self) -> None:
        sregs = self.engine.get_sregs()
        sregs.cs.dpl = sregs.ss.dpl = 3
        self.engine.set_sregs(sregs)

    def compatibility_mode(self) -> None:
        """A code segment of 32 bits, below which long mode goes on."""
        sregs = self.engine.get_sregs()
        sregs.cs.l, sregs.cs.db = 0, 1
        self.engine.set_sregs(sregs)

    def run(self) -> Stop:
        return run(self.engine)

    def exception(self) -> tuple[int, int | None]:
        """Vector, and error code if there is one, of the handler that the guest is in; checks where it was raised."""
        stop = self.run()
        assert isinstance(stop, PortOut), stop
        frame = self.engine.get_regs().rsp
        error = self.memory.word(frame) if STACK - frame == FRAME_BYTES else None
        rip = self.memory.word(frame if error is None else frame + 8)
        assert rip == CODE, "at the instruction"
        return stop.port, error

    def close(self) -> None:
        self.engine.close()
        self.memory.close()


Start: TypeAlias = Callable[..., Guest]
"""start(bit, code, **registers): a guest that ends with the test."""
