"""ScriptedEngine: a guest that is a list of accesses. What an explorer runs in the place of real guest code.

It has a TLB like a CPU: a translation is kept until `flush_tlb`, and an access through it asks nobody. So a stage-2
entry that was zapped without a flush stays usable here, as it would on hardware, and a checker can look into `tlb`.
"""

from __future__ import annotations

import ctypes
import dataclasses

from guestmem.cpu.engine import CpuidTable, GuestMemory, Halt, SliceOver, Stage2Miss, Stop, Translation
from guestmem.cpu.registers import Regs, Sregs

_PAGE = 4096


@dataclasses.dataclass(frozen=True, slots=True)
class Load:
    """Read the byte at `gpa`. `private` is the kind that the guest asserts, None if it cannot."""

    gpa: int
    private: bool | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Store:
    """Write the byte `value` to `gpa`."""

    gpa: int
    value: int
    private: bool | None = None


class ScriptedEngine:
    """Does one access of `script` in each run; halts at the end. `loaded` are the bytes that loads have read.

    `tlb` maps (frame, asserted kind) to its translation.
    """

    def __init__(self, memory: GuestMemory, script: list[Load | Store]) -> None:
        self.script = script
        self.done = 0
        self.loaded: list[int] = []
        self.tlb: dict[tuple[int, bool | None], Translation] = {}
        self._memory = memory
        self._regs = Regs()
        self._sregs = Sregs()

    def run(self) -> Stop:
        if self.done == len(self.script):
            return Halt()
        access = self.script[self.done]
        write = isinstance(access, Store)
        translation = self._translate(access.gpa, write, access.private)
        if translation is None:
            return Stage2Miss(access.gpa, write, private=access.private)
        byte = ctypes.c_uint8.from_address(translation.hva + access.gpa % _PAGE)
        if isinstance(access, Store):
            byte.value = access.value
        else:
            self.loaded.append(byte.value)
        self.done += 1
        return SliceOver()

    def emulate_mmio(self, gpa: int, write: bool) -> Stop:
        """An access to no memory: a load reads 0xff, a store is lost, as on an empty bus."""
        if not write:
            self.loaded.append(0xFF)
        self.done += 1
        return SliceOver()

    def complete(self, value: int) -> None:
        raise AssertionError("a scripted guest asks for nothing")

    def raise_exception(self, vector: int, error_code: int) -> None:
        raise AssertionError("a scripted guest asks for nothing")

    def flush_tlb(self) -> None:
        self.tlb.clear()

    def set_cpuid(self, table: CpuidTable) -> None:
        """A script has no CPUID instruction."""

    def get_regs(self) -> Regs:
        return self._regs

    def set_regs(self, regs: Regs) -> None:
        self._regs = regs

    def get_sregs(self) -> Sregs:
        return self._sregs

    def set_sregs(self, sregs: Sregs) -> None:
        self._sregs = sregs

    def close(self) -> None:
        self.tlb.clear()

    def _translate(self, gpa: int, write: bool, private: bool | None) -> Translation | None:
        key = (gpa // _PAGE, private)
        cached = self.tlb.get(key)
        if cached is not None and (cached.writable or not write):
            return cached
        translation = self._memory.translate(gpa, write, private)
        if translation is not None:
            self.tlb[key] = translation
        return translation
