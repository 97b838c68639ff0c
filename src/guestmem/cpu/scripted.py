"""ScriptedEngine: a guest that is a list of accesses. What an explorer runs in the place of real guest code.

It has a TLB like a CPU: a translation is kept until `flush_tlb`, and an access through it asks nobody. So a stage-2
entry that was zapped without a flush stays usable here, as it would on hardware, and a checker can look into `tlb`.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Sequence
from typing import TypeAlias, cast

from guestmem.cpu.engine import (
    CpuidTable,
    GuestMemory,
    Halt,
    Pvalidate,
    Rmpadjust,
    SliceOver,
    Stage2Miss,
    Stop,
    Tdcall,
    Translation,
    Vmgexit,
)
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


@dataclasses.dataclass(frozen=True, slots=True)
class Write:
    """Write `data` to `gpa`, inside of one page, in one step."""

    gpa: int
    data: bytes
    private: bool | None = None


Call: TypeAlias = Pvalidate | Rmpadjust | Vmgexit | Tdcall
Step: TypeAlias = Load | Store | Write | Call


class ScriptedEngine:
    """Does one access of `script` in each run; halts at the end. `loaded` are the bytes that loads have read,
    `completed` what calls were completed with, or (vector, error code) of the exception that they raised.

    `tlb` maps (frame, asserted kind) to its translation.
    """

    def __init__(self, memory: GuestMemory, script: Sequence[Step]) -> None:
        self.script = cast("list[Step]", script)  # the caller may go on writing it
        self.done = 0
        self.loaded: list[int] = []
        self.completed: list[int | tuple[int, int]] = []
        self.tlb: dict[tuple[int, bool | None], Translation] = {}
        self._at_call = False  # an instruction that is not past until it is answered
        self._memory = memory
        self._regs = Regs()
        self._sregs = Sregs()

    def run(self) -> Stop:
        if self.done == len(self.script):
            return Halt()
        access = self.script[self.done]
        if isinstance(access, Call):
            self._at_call = not isinstance(access, Vmgexit)
            self.done += not self._at_call
            return access
        write = not isinstance(access, Load)
        translation = self._translate(access.gpa, write, access.private)
        if translation is None:
            return Stage2Miss(access.gpa, write, private=access.private)
        at = translation.hva + access.gpa % _PAGE
        byte = ctypes.c_uint8.from_address(at)
        if isinstance(access, Store):
            byte.value = access.value
        elif isinstance(access, Write):
            ctypes.memmove(at, access.data, len(access.data))
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
        self._answer(value)

    def raise_exception(self, vector: int, error_code: int) -> None:
        """The script goes on after the instruction: its handler passes over it."""
        self._answer((vector, error_code))

    def _answer(self, answer: int | tuple[int, int]) -> None:
        self.completed.append(answer)
        self.done += self._at_call
        self._at_call = False

    def flush_tlb(self) -> None:
        self.tlb.clear()

    def set_cpuid(self, table: CpuidTable) -> None:
        """A script has no CPUID instruction."""

    def set_stop_msrs(self, ranges: tuple[range, ...], unknown: bool = False) -> None:
        """Nor RDMSR."""

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
