"""Confirm: a schedule that was found with scripted guests, replayed with guests of machine code on the Unicorn CPU.

Each access of a script becomes one instruction in real mode: a load of AL from the page, or a store of a byte to it,
and an OUT that ends the step. Code is not in the guest's memory but in a page of the harness, so a guest makes exactly
the accesses of its script, and the schedule fits as it is. What is confirmed is that the same property breaks when a
CPU with its own TLB and instruction stream stands where the list of accesses stood.
"""

from __future__ import annotations

import ctypes
import mmap

from guestmem.check.choices import Schedule
from guestmem.check.machine import Machine
from guestmem.check.scenario import Scenario
from guestmem.check.witness import Story, tell
from guestmem.cpu.boot import real_mode
from guestmem.cpu.engine import (
    CpuidTable,
    GuestMemory,
    Halt,
    HostWindow,
    PortOut,
    SliceOver,
    Stage2Miss,
    Stop,
    Translation,
)
from guestmem.cpu.registers import Regs, Sregs
from guestmem.cpu.scripted import Load, Store
from guestmem.memory import PAGE_SIZE

CODE = 0xE000
"""Guest physical address of the harness's page: below what IP reaches, above what scenarios use."""
_PORT = 0x80
_LOAD_AL = b"\xa0"  # mov al, [disp16]
_STORE_BYTE = b"\xc6\x06"  # mov byte [disp16], imm8
_OUT = b"\xe6" + bytes([_PORT])
_HLT = b"\xf4"
_CODE_BYTES = 5
_STEP = 8


class Unconfirmable(Exception):
    """The scripts of a scenario cannot be made into machine code of this kind."""


class _WithCode:
    """Stage 2 with the harness's page in it. Without a page bit, which would say what real mode cannot: that an access
    is of the kind that the page has."""

    page_bit = None

    def __init__(self, memory: GuestMemory, code: int) -> None:
        self._memory = memory
        self._code = Translation(code, False, HostWindow(code, PAGE_SIZE))

    def translate(self, gpa: int, write: bool, private: bool | None) -> Translation | None:
        if gpa // PAGE_SIZE == CODE // PAGE_SIZE:
            return None if write else self._code
        return self._memory.translate(gpa, write, private)


class CompiledEngine:
    """An engine with the behaviour of ScriptedEngine, whose accesses Unicorn executes."""

    def __init__(self, memory: GuestMemory, script: list[Load | Store]) -> None:
        from guestmem.cpu.unicorn import UnicornEngine

        self._page = mmap.mmap(-1, PAGE_SIZE)
        self._page.write(_compile(script))
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._page))
        self.script = script
        self.done = 0
        self.loaded: list[int] = []
        self._engine = UnicornEngine(_WithCode(memory, address))
        start = real_mode(CODE)
        self._engine.set_sregs(start.sregs)
        self._engine.set_regs(start.regs)

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
            return Stage2Miss(self.script[self.done].gpa, isinstance(self.script[self.done], Store))
        return stop

    def emulate_mmio(self, gpa: int, write: bool) -> Stop:
        """An access to no memory, as on an empty bus: a load reads 0xff, a store is lost."""
        self._completed(0xFF)
        regs = self._engine.get_regs()
        regs.rip = CODE + self.done * _STEP
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


def confirm(scenario: Scenario, schedule: Schedule, scripted: Story) -> str:
    """Replay on the Unicorn CPU; a sentence that says what came of it."""
    if not any(isinstance(engine, CompiledEngine) for engine in _engines(scenario)):
        return "confirm: no guest in this scenario; the Unicorn CPU has nothing to do"
    with _unicorn_guests():
        try:
            real = tell(scenario, schedule)
        except Unconfirmable as why:
            return f"confirm: not possible, {why}"
    if real.property == scripted.property and len(real.steps) == len(scripted.steps):
        return f"confirmed: {real.property} breaks in the same step with the guests on the Unicorn CPU"
    return f"NOT confirmed: on the Unicorn CPU the schedule gives {real.property or 'no violation'}: {real.facts}"


def _engines(scenario: Scenario) -> list[object]:
    """The engines of a machine of the scenario, made by Unicorn."""
    with _unicorn_guests():
        machine = scenario.build()
        assert isinstance(machine, Machine)
        engines: list[object] = [vcpu.engine for kvm in machine.vms for vcpu in kvm.vcpus.values()]
        machine.forget()
    return engines


class _unicorn_guests:  # noqa: N801
    """While it is entered, machines make their guests with CompiledEngine."""

    def __enter__(self) -> None:
        self._before = Machine.script_engine
        Machine.script_engine = CompiledEngine

    def __exit__(self, *exception: object) -> None:
        Machine.script_engine = self._before


def _compile(script: list[Load | Store]) -> bytes:
    """One access each `_STEP` bytes: the instruction, an OUT, padding."""
    code = b""
    for access in script:
        if access.private is not None or not 0 <= access.gpa < CODE:
            raise Unconfirmable(f"{access} has no instruction in real mode below {CODE:#x}")
        place = access.gpa.to_bytes(2, "little")
        if isinstance(access, Load):
            step = _LOAD_AL + place + _OUT
        else:
            step = _STORE_BYTE + place + bytes([access.value]) + _OUT
        code += step.ljust(_STEP, b"\x90")
    return code + _HLT
