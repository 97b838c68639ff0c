"""Pic: a pair of 8259As, the second on line 2 of the first, as a PC has them.

One 8259A is a `Controller`; the pair has the lines 0 to 15 and the output that LINT0 of the APICs sees.

Source: 8259A datasheet; arch/x86/kvm/i8259.c pic_get_irq, pic_intack, pic_ioport_write, pic_poll_read, kvm_pic_reset.
From the datasheet but not from KVM, so not here either: single mode, level-triggered mode by ICW1 (a PC has ELCR), the
MCS-80 vectors.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from guestmem.kvm.irqchip.ioapic import PinListener

LINES = 16
_CASCADE = 2
_SPURIOUS = 7
_ICW1, _ICW1_NEEDS_ICW4 = 1 << 4, 1 << 0
_OCW3, _OCW3_POLL, _OCW3_READ, _OCW3_SPECIAL_MASK = 1 << 3, 1 << 2, 1 << 1, 1 << 6
_STATE = struct.Struct("<16B")
_FIELDS = (
    "last_irr", "irr", "imr", "isr", "priority_add", "base", "reads_isr", "poll", "special_mask", "init_state",
    "auto_eoi", "rotate_on_auto_eoi", "special_fully_nested", "needs_icw4", "elcr", "elcr_mask",
)  # fmt: skip


class Controller:
    """One 8259A. Fields are those of struct kvm_pic_state, bytes; `init_state` is the ICW that comes next, 0 for none
    (an OCW1), `priority_add` the line of highest priority."""

    def __init__(self, elcr_mask: int, first_line: int) -> None:
        self.first_line = first_line
        self.elcr = 0
        self.elcr_mask = elcr_mask
        self.clear()

    def clear(self) -> None:
        """Everything but ELCR."""
        self.last_irr = self.irr = self.imr = self.isr = 0
        self.priority_add = self.base = self.reads_isr = self.poll = self.special_mask = self.init_state = 0
        self.auto_eoi = self.rotate_on_auto_eoi = self.special_fully_nested = self.needs_icw4 = 0

    def set_line(self, line: int, is_up: bool) -> int:
        """1: newly requested; 0: it was so already; -1: masked. Source: pic_set_irq1."""
        bit, result = 1 << line, 1
        if is_up:
            if self.elcr & bit or not self.last_irr & bit:
                result = int(not self.irr & bit)
                self.irr |= bit
            self.last_irr |= bit
        else:
            self.last_irr &= ~bit
            if self.elcr & bit:
                self.irr &= ~bit
        return -1 if self.imr & bit else result

    def requested(self) -> int:
        """The line that it interrupts for; -1 for none: the highest request above what is in service. Source:
        pic_get_irq."""
        priority = self._priority(self.irr & ~self.imr)
        in_service = self.isr
        if self.special_fully_nested and not self.first_line:
            in_service &= ~(1 << _CASCADE)
        if priority == 8 or priority >= self._priority(in_service):
            return -1
        return priority + self.priority_add & 7

    def highest_in_service(self) -> int:
        priority = self._priority(self.isr)
        return -1 if priority == 8 else priority + self.priority_add & 7

    def _priority(self, lines: int) -> int:
        """0 is the highest; 8 without a line."""
        rotated = (lines | lines << 8) >> (self.priority_add & 7) & 0xFF
        return (rotated & -rotated).bit_length() - 1 if rotated else 8

    def pack(self) -> bytes:
        """struct kvm_pic_state."""
        return _STATE.pack(*(getattr(self, name) & 0xFF for name in _FIELDS))

    def unpack(self, data: bytes) -> None:
        """Any bytes: KVM checks none either, and where they are used they are taken modulo what can be."""
        for name, value in zip(_FIELDS, _STATE.unpack_from(data), strict=True):
            setattr(self, name, value)


class Pic:
    """The pair. `on_output` is called when `output` goes up. `listener` hears of the ends of interrupts by line."""

    def __init__(self, listener: PinListener, on_output: Callable[[], None]) -> None:
        self._listener = listener
        self._on_output = on_output
        self.output = False
        self.controllers = Controller(0xF8, 0), Controller(0xDE, 8)
        self.lines = [0] * LINES

    # Lines

    def set_line(self, line: int, source: int, is_up: bool) -> int:
        """Drive a line, as one of several sources. See Controller.set_line."""
        self.lines[line] = self.lines[line] | 1 << source if is_up else self.lines[line] & ~(1 << source)
        result = self.controllers[line >> 3].set_line(line & 7, bool(self.lines[line]))
        self.update()
        return result

    def update(self) -> None:
        """Work out the output, after anything that may change it. Source: pic_update_irq."""
        first, second = self.controllers
        if second.requested() >= 0:
            first.set_line(_CASCADE, True)
            first.set_line(_CASCADE, False)
        was_up, self.output = self.output, first.requested() >= 0
        if self.output and not was_up:
            self._on_output()

    def acknowledge(self) -> int:
        """INTA: the vector of what is requested, which is in service now. Source: kvm_pic_read_irq."""
        first, second = self.controllers
        line = first.requested()
        if line >= 0:
            self._take(first, line)
        if line != _CASCADE:
            vector = first.base + (line if line >= 0 else _SPURIOUS)
        else:
            behind = second.requested()
            if behind >= 0:
                self._take(second, behind)
            vector = second.base + (behind if behind >= 0 else _SPURIOUS)
        self.update()
        return vector & 0xFF

    def _take(self, chip: Controller, line: int) -> None:
        """Source: pic_intack."""
        chip.isr |= 1 << line
        if not chip.elcr >> line & 1:
            chip.irr &= ~(1 << line)
        if chip.auto_eoi:
            if chip.rotate_on_auto_eoi:
                chip.priority_add = line + 1 & 7
            self._end(chip, line)

    def _end(self, chip: Controller, line: int) -> None:
        """Source: pic_clear_isr."""
        chip.isr &= ~(1 << line)
        self._listener.acked(chip.first_line + line)

    # Ports

    def read(self, port: int, size: int) -> int:
        """Only bytes; anything wider reads 0. Source: picdev_read."""
        if size != 1:
            return 0
        if port >= 0x4D0:
            return self.controllers[port & 1].elcr
        chip = self.controllers[port >> 7]
        if chip.poll:
            chip.poll = 0
            return self._poll(chip)
        if port & 1:
            return chip.imr
        return chip.isr if chip.reads_isr else chip.irr

    def write(self, port: int, size: int, value: int) -> None:
        """Only bytes. Source: picdev_write."""
        if size != 1:
            return
        value &= 0xFF
        if port >= 0x4D0:
            chip = self.controllers[port & 1]
            chip.elcr = value & chip.elcr_mask
        elif port & 1:
            self._write_data(self.controllers[port >> 7], value)
        else:
            self._write_command(self.controllers[port >> 7], value)

    def _write_command(self, chip: Controller, value: int) -> None:
        if value & _ICW1:
            self._initialise(chip, value)
        elif value & _OCW3:
            chip.poll = chip.poll or int(bool(value & _OCW3_POLL))
            if value & _OCW3_READ:
                chip.reads_isr = value & 1
            if value & _OCW3_SPECIAL_MASK:
                chip.special_mask = value >> 5 & 1
        else:
            self._end_by_command(chip, value >> 5, value & 7)

    def _initialise(self, chip: Controller, value: int) -> None:
        """ICW1: requests by edge are forgotten, and whoever hears acks hears theirs; those of level lines stay."""
        forgotten = chip.irr & ~chip.elcr
        chip.needs_icw4 = value & _ICW1_NEEDS_ICW4
        chip.last_irr = chip.imr = chip.priority_add = chip.special_mask = chip.reads_isr = 0
        chip.irr &= chip.elcr
        if not chip.needs_icw4:
            chip.special_fully_nested = chip.auto_eoi = 0
        chip.init_state = 1
        for line in range(8):
            if forgotten >> line & 1:
                self._end(chip, line)
        self.update()

    def _end_by_command(self, chip: Controller, command: int, line: int) -> None:
        """OCW2: command is R, SL, EOI."""
        rotates, is_specific, ends = command & 4, command & 2, command & 1
        if not ends:
            if is_specific and rotates:
                chip.priority_add = line + 1 & 7
                self.update()
            elif not is_specific:
                chip.rotate_on_auto_eoi = int(bool(rotates))
            return
        if not is_specific:
            line = chip.highest_in_service()
            if line < 0:
                return
        if rotates:
            chip.priority_add = line + 1 & 7
        self._end(chip, line)
        self.update()

    def _write_data(self, chip: Controller, value: int) -> None:
        match chip.init_state:
            case 1:
                chip.base, chip.init_state = value & 0xF8, 2
            case 2:
                chip.init_state = 3 if chip.needs_icw4 else 0
            case 3:
                chip.special_fully_nested, chip.auto_eoi, chip.init_state = value >> 4 & 1, value >> 1 & 1, 0
            case _:
                changed, chip.imr = chip.imr ^ value, value
                for line in range(8):
                    if changed >> line & 1:
                        self._listener.masked(chip.first_line + line, bool(value >> line & 1))
                self.update()

    def _poll(self, chip: Controller) -> int:
        """The read after a poll command takes the request. Source: pic_poll_read."""
        line = chip.requested()
        if line < 0:
            self.update()
            return _SPURIOUS
        if chip.first_line:
            first = self.controllers[0]
            first.isr &= ~(1 << _CASCADE)
            first.irr &= ~(1 << _CASCADE)
        chip.irr &= ~(1 << line)
        self._end(chip, line)
        if chip.first_line or line != _CASCADE:
            self.update()
        return line

    # State

    def pack(self, which: int) -> bytes:
        """struct kvm_pic_state of the first (0) or second (1)."""
        return self.controllers[which].pack()

    def unpack(self, which: int, data: bytes) -> None:
        self.controllers[which].unpack(data)
        self.update()
