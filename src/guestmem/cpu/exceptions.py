"""Exceptions and software interrupts of the guest, delivered as the CPU does it.

Unicorn raises an exception and leaves the rest to its caller. `deliver` does the rest on Regs and Sregs: it finds the
gate, switches the stack if the privilege level or the gate's IST asks for it, pushes the frame and enters the handler.
A fault on the way becomes the second exception of the table of double faults; a fault after that is a triple fault.
Nothing of `regs` and `sregs` changes before the last memory access is done, so a delivery that stage 2 interrupts is
repeated as a whole.

Source: Intel SDM vol. 3, chapter 7 "Interrupt and exception handling" (double faults: tables 7-4 and 7-5), and vol. 2,
"INT n"; AMD APM vol. 2, 15.35.5 for #VC, which makes no double fault here. Not modelled: task gates and virtual-8086
mode (both are `Unsupported`), shadow stacks, segment limits of stacks.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from guestmem.cpu.guest_memory import GuestFault, LinearMemory
from guestmem.cpu.guest_walk import CR0_PE, EFER_LMA
from guestmem.cpu.registers import DescriptorTable, Regs, Segment, Sregs

DB, NMI, BP, OF, UD, DF, TS, NP, SS, GP, PF, VC = 1, 2, 3, 4, 6, 8, 10, 11, 12, 13, 14, 29
_WITH_ERROR_CODE = frozenset((DF, TS, NP, SS, GP, PF, 17, 21, VC))
_CONTRIBUTORY = frozenset((0, TS, NP, SS, GP))
_FAULTS = frozenset((0, 5, UD, 7, TS, NP, SS, GP, PF, 16, 17, 19, VC))

RFLAGS_TF, RFLAGS_IF, RFLAGS_NT, RFLAGS_RF, RFLAGS_VM = 1 << 8, 1 << 9, 1 << 14, 1 << 16, 1 << 17
_CLEARED = RFLAGS_TF | RFLAGS_NT | RFLAGS_RF | RFLAGS_VM
_INTERRUPT_16, _TRAP_16, _INTERRUPT_32, _TRAP_32, _TASK = 6, 7, 14, 15, 5


class Unsupported(Exception):
    """The guest asks for something that is not modelled; the message says what."""


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """An exception, an interrupt from outside, or an INT instruction of `length` bytes that RIP is past.

    `address` is CR2 of a page fault.
    """

    vector: int
    error_code: int = 0
    length: int = 0
    address: int = 0
    external: bool = False

    @property
    def software(self) -> bool:
        """Whether an INT instruction asked for it."""
        return self.length > 0

    @property
    def exception(self) -> bool:
        """Whether it is one: with an error code, and perhaps half of a double fault."""
        return not self.software and not self.external


class _Gate(NamedTuple):
    """A gate of a protected-mode IDT. `size` is that of a word of the frame, bytes."""

    selector: int
    offset: int
    interrupt: bool
    size: int
    ist: int


class _Stack(NamedTuple):
    """Where the frame goes: `segment` replaces SS if it is not None."""

    segment: Segment | None
    pointer: int
    base: int
    mask: int


def has_error_code(vector: int) -> bool:
    """Whether the exception pushes one."""
    return vector in _WITH_ERROR_CODE


def deliver(event: Event, regs: Regs, sregs: Sregs, memory: LinearMemory) -> bool:
    """Enter the guest's handler of `event`. False is a triple fault: there is no handler that can be entered.

    Raises: Stage2Refused, after which the same call may be repeated; Unsupported.
    """
    current, rip = event, regs.rip
    while True:
        if current.vector == PF:
            sregs.cr2 = current.address
        try:
            _deliver_once(current, rip, regs, sregs, memory)
            return True
        except GuestFault as fault:
            second = Event(fault.vector, fault.error_code, address=fault.address)
        if current.vector == DF and (second.vector in _CONTRIBUTORY or second.vector == PF):
            return False
        if second.vector == PF:
            sregs.cr2 = second.address
        # A fault of an INT is reported at the INT.
        rip -= current.length
        current = Event(DF) if _makes_double_fault(current, second) else second


def _makes_double_fault(first: Event, second: Event) -> bool:
    if not first.exception:
        return False
    if first.vector == PF:
        return second.vector in _CONTRIBUTORY or second.vector == PF
    return first.vector in _CONTRIBUTORY and second.vector in _CONTRIBUTORY


def _deliver_once(event: Event, rip: int, regs: Regs, sregs: Sregs, memory: LinearMemory) -> None:
    if regs.rflags & RFLAGS_VM:
        raise Unsupported(f"vector {event.vector} in virtual-8086 mode")
    if sregs.cr0 & CR0_PE:
        _Delivery(event, rip, regs, sregs, memory).protected()
    else:
        _deliver_real(event, rip, regs, sregs, memory)


def _deliver_real(event: Event, rip: int, regs: Regs, sregs: Sregs, memory: LinearMemory) -> None:
    """Through the interrupt vector table: IP and CS, no error code."""
    if event.vector * 4 + 3 > sregs.idt.limit:
        raise GuestFault(GP, event.vector * 8 + 2)
    entry = memory.read(sregs.idt.base + event.vector * 4, 4)
    pointer = regs.rsp
    for word in (regs.rflags, sregs.cs.selector, rip):
        pointer = pointer & ~0xFFFF | (pointer - 2 & 0xFFFF)
        memory.write(sregs.ss.base + (pointer & 0xFFFF), word, 2)
    regs.rsp, regs.rip = pointer, entry & 0xFFFF
    regs.rflags &= ~(RFLAGS_IF | RFLAGS_TF | RFLAGS_RF | 1 << 18)
    sregs.cs.selector, sregs.cs.base = entry >> 16, (entry >> 16) << 4


class _Delivery:
    """One delivery in protected or long mode."""

    def __init__(self, event: Event, rip: int, regs: Regs, sregs: Sregs, memory: LinearMemory) -> None:
        self.rip = rip
        self.event, self.regs, self.sregs, self.memory = event, regs, sregs, memory
        self.long_mode = bool(sregs.efer & EFER_LMA)
        self.cpl = sregs.ss.dpl
        self.ext = 0 if event.software else 1

    def protected(self) -> None:
        """All of it; registers change in the last step only."""
        gate = self.gate()
        code = self.code(gate.selector)
        # A conforming handler runs at the level of what it interrupts.
        level = self.cpl if code.type & 4 else code.dpl
        stack = self.long_stack(gate, level) if self.long_mode else self.stack(level)
        pointer = self.push(gate.size, stack)
        self.enter(gate, code, level, stack, pointer)

    def gate(self) -> _Gate:
        """The gate of the vector, checked."""
        vector, idt = self.event.vector, self.sregs.idt
        size = 16 if self.long_mode else 8
        error_code = vector * 8 + 2 + self.ext
        if vector * size + size - 1 > idt.limit:
            raise GuestFault(GP, error_code)
        low = self.memory.read(idt.base + vector * size, 8)
        kind = low >> 40 & 31
        if kind == _TASK and not self.long_mode:
            raise Unsupported(f"vector {vector} through a task gate")
        if kind not in ((_INTERRUPT_32, _TRAP_32) if self.long_mode else (6, 7, 14, 15)):
            raise GuestFault(GP, error_code)
        if self.event.software and (low >> 45 & 3) < self.cpl:
            raise GuestFault(GP, error_code)
        if not low >> 47 & 1:
            raise GuestFault(NP, error_code)
        offset = low & 0xFFFF | (low >> 32 & 0xFFFF_0000 if kind >= _INTERRUPT_32 else 0)
        interrupt = kind in (_INTERRUPT_16, _INTERRUPT_32)
        if not self.long_mode:
            return _Gate(low >> 16 & 0xFFFF, offset, interrupt, 4 if kind >= _INTERRUPT_32 else 2, 0)
        offset |= self.memory.read(idt.base + vector * size + 8, 4) << 32
        return _Gate(low >> 16 & 0xFFFF, offset, interrupt, 8, low >> 32 & 7)

    def code(self, selector: int) -> Segment:
        """The handler's code segment."""
        error_code = selector & ~3 | self.ext
        if selector & ~3 == 0:
            raise GuestFault(GP, self.ext)
        code = self.descriptor(selector, GP)
        if not code.s or not code.type & 8 or code.dpl > self.cpl or (self.long_mode and (not code.l or code.db)):
            raise GuestFault(GP, error_code)
        if not code.present:
            raise GuestFault(NP, error_code)
        return code

    def descriptor(self, selector: int, vector: int) -> Segment:
        """The segment of `selector`; `vector` is the exception if its table does not reach that far."""
        ldt = self.sregs.ldt
        table = DescriptorTable(ldt.base, -1 if ldt.unusable else ldt.limit) if selector & 4 else self.sregs.gdt
        if (selector & ~7) + 7 > table.limit:
            raise GuestFault(vector, selector & ~3 | self.ext)
        return decode_descriptor(selector, self.memory.read(table.base + (selector & ~7), 8))

    def long_stack(self, gate: _Gate, level: int) -> _Stack:
        """RSP from the IST, from the TSS if the level changes, or as it is; SS becomes null if the level changes."""
        if gate.ist:
            pointer = self.tss(36 + (gate.ist - 1) * 8, 8)
        elif level < self.cpl:
            pointer = self.tss(4 + level * 8, 8)
        else:
            pointer = self.regs.rsp
        segment = None
        if level < self.cpl:
            segment = Segment(selector=level, limit=0, type=0, present=0, dpl=level, s=0, unusable=1)
        return _Stack(segment, pointer & ~15, 0, 0xFFFF_FFFF_FFFF_FFFF)

    def stack(self, level: int) -> _Stack:
        """The same without long mode: SS and ESP of the inner level are both in the TSS."""
        if level == self.cpl:
            ss = self.sregs.ss
            return _Stack(None, self.regs.rsp, ss.base, 0xFFFF_FFFF if ss.db else 0xFFFF)
        if self.sregs.tr.type & 8:
            pointer, selector = self.tss(4 + level * 8, 4), self.tss(8 + level * 8, 2)
        else:
            pointer, selector = self.tss(2 + level * 4, 2), self.tss(4 + level * 4, 2)
        error_code = selector & ~3 | self.ext
        if selector & ~3 == 0 or selector & 3 != level:
            raise GuestFault(TS, error_code)
        ss = self.descriptor(selector, TS)
        if not ss.s or ss.dpl != level or ss.type & 10 != 2:
            raise GuestFault(TS, error_code)
        if not ss.present:
            raise GuestFault(SS, error_code)
        return _Stack(ss, pointer, ss.base, 0xFFFF_FFFF if ss.db else 0xFFFF)

    def tss(self, offset: int, size: int) -> int:
        """`size` bytes of the task state segment."""
        tr = self.sregs.tr
        if offset + size - 1 > tr.limit:
            raise GuestFault(TS, tr.selector & ~3 | self.ext)
        return self.memory.read(tr.base + offset, size)

    def push(self, size: int, stack: _Stack) -> int:
        """Push the frame; the stack pointer after it."""
        regs, sregs, event = self.regs, self.sregs, self.event
        resume = RFLAGS_RF if event.vector in _FAULTS and event.exception else 0
        frame = [regs.rflags | resume, sregs.cs.selector, self.rip]
        if self.long_mode or stack.segment is not None:
            frame[:0] = [sregs.ss.selector, regs.rsp]
        if event.vector in _WITH_ERROR_CODE and event.exception:
            frame.append(event.error_code)
        pointer = stack.pointer
        for word in frame:
            pointer = pointer & ~stack.mask | (pointer - size & stack.mask)
            try:
                self.memory.write(stack.base + (pointer & stack.mask), word, size)
            except GuestFault as fault:
                raise GuestFault(SS, self.ext) if fault.vector == GP else fault from None
        return pointer

    def enter(self, gate: _Gate, code: Segment, level: int, stack: _Stack, pointer: int) -> None:
        """The first instruction of the handler is next."""
        regs, sregs = self.regs, self.sregs
        if stack.segment is not None:
            sregs.ss = stack.segment
        code.selector = gate.selector & ~3 | level
        sregs.cs = code
        regs.rsp, regs.rip = pointer, gate.offset
        regs.rflags &= ~(_CLEARED | (RFLAGS_IF if gate.interrupt else 0))


def decode_descriptor(selector: int, raw: int) -> Segment:
    """A segment descriptor of 8 bytes as the hidden part of a segment register."""
    limit = raw & 0xFFFF | raw >> 32 & 0xF_0000
    return Segment(
        base=raw >> 16 & 0xFF_FFFF | raw >> 32 & 0xFF00_0000,
        limit=limit << 12 | 0xFFF if raw >> 55 & 1 else limit,
        selector=selector,
        type=raw >> 40 & 15,
        present=raw >> 47 & 1,
        dpl=raw >> 45 & 3,
        db=raw >> 54 & 1,
        s=raw >> 44 & 1,
        l=raw >> 53 & 1,
        g=raw >> 55 & 1,
        avl=raw >> 52 & 1,
        unusable=1 - (raw >> 47 & 1),
    )
