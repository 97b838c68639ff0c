"""CompiledEngine: the accesses of a script as machine code, which Unicorn executes.

Each access becomes one instruction: a load of AL from the page, or a store of a byte to it, and an OUT that ends the
step. Accesses that assert nothing are made in real mode, on a machine without a page bit: with one, all would be
private there. A script that asserts a kind in each access is made in long mode, under tables that map the guest's
memory twice, with the C-bit and without.

Code and tables are not in the guest's memory but in pages of the harness, so a guest makes no other accesses.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from typing import NamedTuple

from guestmem.cpu import boot
from guestmem.cpu.engine import (
    CpuidTable,
    GuestMemory,
    Halt,
    HostWindow,
    PageBit,
    PortOut,
    SliceOver,
    Stage2Miss,
    Stop,
    Translation,
)
from guestmem.cpu.registers import Regs, Sregs
from guestmem.cpu.scripted import Load, Step, Store
from guestmem.memory import PAGE_SIZE

CODE = 0xE000
"""Guest physical address of the harness's pages: below what IP reaches, above what scenarios use."""
_PORT = 0x80
_LOAD_AL = b"\xa0"  # mov al, [disp16]
_STORE_BYTE = b"\xc6\x06"  # mov byte [disp16], imm8
_LONG_LOAD_AL = b"\x8a\x04\x25"  # mov al, [disp32]
_LONG_STORE_BYTE = b"\xc6\x04\x25"  # mov byte [disp32], imm8
_OUT = b"\xe6" + bytes([_PORT])
_HLT = b"\xf4"
_STEP, _LONG_STEP = 8, 16
_C_BIT = PageBit(51, set_is_private=True)
_SHARED_VIEW = boot.PAGE_2M
"""Where the first 2M are mapped without the C-bit; with it they are at 0."""


class Unconfirmable(Exception):
    """The scripts of a scenario cannot be made into machine code of this kind."""


class _Code(NamedTuple):
    """What stands at CODE, whole pages, and how to start it; an access each `step` bytes."""

    pages: bytes
    start: boot.Start
    step: int
    page_bit: PageBit | None


class _WithCode:
    """Stage 2 with the harness's pages in it, which are of any kind."""

    def __init__(self, memory: GuestMemory, window: HostWindow, page_bit: PageBit | None) -> None:
        self._memory, self._window = memory, window
        self.page_bit = page_bit

    def translate(self, gpa: int, write: bool, private: bool | None) -> Translation | None:
        offset = (gpa - CODE) & -PAGE_SIZE
        if 0 <= offset < self._window.size:
            return Translation(self._window.base + offset, True, self._window)
        return self._memory.translate(gpa, write, private)


class CompiledEngine:
    """An engine with the behaviour of ScriptedEngine, whose accesses Unicorn executes."""

    def __init__(self, memory: GuestMemory, script: Sequence[Step]) -> None:
        from guestmem.cpu.unicorn import UnicornEngine

        accesses = _accesses(script)
        code = _compile_asserting(accesses) if _asserts(accesses) else _compile_real(accesses)
        self._step = code.step
        self._pages = mmap.mmap(-1, len(code.pages))
        self._pages.write(code.pages)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._pages))
        self.script = script
        self.done = 0
        self.loaded: list[int] = []
        self._engine = UnicornEngine(_WithCode(memory, HostWindow(address, len(code.pages)), code.page_bit))
        self._engine.set_sregs(code.start.sregs)
        self._engine.set_regs(code.start.regs)

    def __fingerprint__(self) -> tuple[int, tuple[int, ...]]:
        """What of a guest is state: how far it is and what it has read."""
        return self.done, tuple(self.loaded)

    def run(self) -> Stop:
        if self.done == len(self.script):
            return Halt()
        stop = self._engine.run()
        while isinstance(stop, SliceOver):
            stop = self._engine.run()
        if isinstance(stop, PortOut):
            self._completed(stop.value & 0xFF)
            return SliceOver()
        if isinstance(stop, Stage2Miss):
            access = self.script[self.done]
            assert isinstance(access, Load | Store)
            return Stage2Miss(access.gpa, isinstance(access, Store), private=access.private)
        return stop

    def set_stop_msrs(self, ranges: tuple[range, ...], unknown: bool = False) -> None:
        """A script has no RDMSR."""

    def emulate_mmio(self, gpa: int, write: bool) -> Stop:
        """An access to no memory, as on an empty bus: a load reads 0xff, a store is lost."""
        self._completed(0xFF)
        regs = self._engine.get_regs()
        regs.rip = CODE + self.done * self._step
        self._engine.set_regs(regs)
        return SliceOver()

    def complete(self, value: int) -> None:
        raise AssertionError("a compiled script asks for nothing")

    def raise_exception(self, vector: int, error_code: int) -> None:
        self._engine.raise_exception(vector, error_code)

    def flush_tlb(self) -> None:
        self._engine.flush_tlb()

    def set_cpuid(self, table: CpuidTable) -> None:
        self._engine.set_cpuid(table)

    def get_regs(self) -> Regs:
        return self._engine.get_regs()

    def set_regs(self, regs: Regs) -> None:
        self._engine.set_regs(regs)

    def get_sregs(self) -> Sregs:
        return self._engine.get_sregs()

    def set_sregs(self, sregs: Sregs) -> None:
        self._engine.set_sregs(sregs)

    def close(self) -> None:
        self._engine.close()

    def _completed(self, byte: int) -> None:
        if isinstance(self.script[self.done], Load):
            self.loaded.append(byte)
        self.done += 1


def _accesses(script: Sequence[Step]) -> list[Load | Store]:
    for step in script:
        if not isinstance(step, Load | Store):
            raise Unconfirmable(f"{step} is no access of one byte")
    return [step for step in script if isinstance(step, Load | Store)]


def _asserts(script: list[Load | Store]) -> bool:
    """Whether the accesses say which kind they are. Raises: Unconfirmable, if some do and others do not."""
    asserting = {access.private is not None for access in script}
    if len(asserting) > 1:
        raise Unconfirmable("a guest has a page bit or has none, and a script that asserts a kind must always do")
    return asserting == {True}


def _compile_real(script: list[Load | Store]) -> _Code:
    steps = [_instruction(access, _LOAD_AL, _STORE_BYTE, _place(access).to_bytes(2, "little")) for access in script]
    return _Code(_page(steps, _STEP), boot.real_mode(CODE), _STEP, None)


def _compile_asserting(script: list[Load | Store]) -> _Code:
    steps = []
    for access in script:
        linear = _place(access) + (0 if access.private else _SHARED_VIEW)
        steps.append(_instruction(access, _LONG_LOAD_AL, _LONG_STORE_BYTE, linear.to_bytes(4, "little")))
    pages = bytearray(_page(steps, _LONG_STEP))
    tables, mapped = CODE + len(pages), 2 * boot.PAGE_2M
    pages += bytes(boot.tables_size(mapped))

    def write(gpa: int, data: bytes) -> None:
        pages[gpa - CODE : gpa - CODE + len(data)] = data

    start = boot.long_mode(CODE, 0, tables, mapped, write)
    directory = tables + boot.tables_size(mapped) - PAGE_SIZE  # the last of the tables has the two leaves
    leaf = int.from_bytes(pages[directory - CODE : directory - CODE + 8], "little")
    write(directory, (leaf | 1 << _C_BIT.position).to_bytes(8, "little") + leaf.to_bytes(8, "little"))
    return _Code(bytes(pages), start, _LONG_STEP, _C_BIT)


def _place(access: Load | Store) -> int:
    if not 0 <= access.gpa < CODE:
        raise Unconfirmable(f"{access} is not below {CODE:#x}, where the harness's code stands")
    return access.gpa


def _instruction(access: Load | Store, load: bytes, store: bytes, place: bytes) -> bytes:
    if isinstance(access, Load):
        return load + place + _OUT
    return store + place + bytes([access.value]) + _OUT


def _page(steps: list[bytes], step: int) -> bytes:
    """The steps, and HLT after the last, as a page. Raises: Unconfirmable, for a script that is longer."""
    code = b"".join(each.ljust(step, b"\x90") for each in steps) + _HLT
    if len(code) > PAGE_SIZE:
        raise Unconfirmable(f"a script of {len(steps)} accesses")
    return code.ljust(PAGE_SIZE, b"\0")
