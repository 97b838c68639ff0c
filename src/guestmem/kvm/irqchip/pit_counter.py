"""PitCounter: one counter of an 8254: count, latches, gate and output, as functions of the time since it was loaded.

Source: 8254 datasheet, "Mode definitions"; arch/x86/kvm/i8254.c pit_get_count, pit_get_out, pit_set_gate,
pit_ioport_read, pit_ioport_write. As there, binary counting only, and a gate that stops modes 0 and 4 is only noted.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

FREQUENCY = 1_193_182
"""Hz."""
NSEC_PER_SEC = 1_000_000_000
_LOW, _HIGH, _BOTH, _BOTH_HIGH = 1, 2, 3, 4
_STATE = struct.Struct("<IH10BQ")
STATE_SIZE = _STATE.size


class PitCounter:
    """`count` is what was loaded, 1 to 65536. `elapsed` gives the nanoseconds since then."""

    def __init__(self, elapsed: Callable[[], int]) -> None:
        self._elapsed = elapsed
        self.count, self.load_time = 0x10000, 0
        self.mode, self.bcd, self.gate = 0, 0, 0
        self.access = self.read_state = self.write_state = 0
        self.latched_count, self.count_latched = 0, 0
        self.status, self.status_latched, self.write_latch = 0, 0, 0

    def ticks(self) -> int:
        return self._elapsed() * FREQUENCY // NSEC_PER_SEC

    def current(self) -> int:
        """The counting element. One-shots go on below zero; mode 3 counts by two."""
        ticks = self.ticks()
        match self.mode:
            case 0 | 1 | 4 | 5:
                return self.count - ticks & 0xFFFF
            case 3:
                return self.count - 2 * ticks % self.count
            case _:
                return self.count - ticks % self.count

    def output(self) -> int:
        """OUT, 0 or 1."""
        ticks, count = self.ticks(), self.count
        match self.mode:
            case 1:
                return int(ticks < count)
            case 2:
                return int(ticks % count == 0 and ticks != 0)
            case 3:
                return int(ticks % count < (count + 1) // 2)
            case 4 | 5:
                return int(ticks == count)
            case _:
                return int(ticks >= count)

    def set_gate(self, gate: int, now: int) -> None:
        """A rising edge triggers the one-shot of modes 1 and 5, and starts modes 2 and 3 over."""
        if gate > self.gate and self.mode in (1, 2, 3, 5):
            self.load_time = now
        self.gate = gate

    def program(self, control: int) -> None:
        """A control word that names this counter."""
        access = control >> 4 & 3
        if not access:
            self.latch_count()
            return
        self.access = self.read_state = self.write_state = access
        mode = control >> 1 & 7
        self.mode = mode - 4 if mode > 5 else mode
        self.bcd = control & 1

    def latch_count(self) -> None:
        """Until it is read the latch keeps what it has."""
        if not self.count_latched:
            self.latched_count, self.count_latched = self.current(), self.access

    def latch_status(self) -> None:
        if not self.status_latched:
            self.status = (self.output() << 7 | self.access << 4 | self.mode << 1 | self.bcd) & 0xFF
            self.status_latched = 1

    def write(self, value: int) -> int | None:
        """A byte of a new count: the whole of it, if this was its last."""
        if self.write_state == _BOTH:
            self.write_latch, self.write_state = value, _BOTH_HIGH
            return None
        if self.write_state == _BOTH_HIGH:
            self.write_state = _BOTH
            return self.write_latch | value << 8
        return value << 8 if self.write_state == _HIGH else value

    def read(self) -> int:
        """The byte that is next: status, a latched count, or the count as it goes."""
        if self.status_latched:
            self.status_latched = 0
            return self.status
        if self.count_latched:
            state = self.count_latched
            self.count_latched = _HIGH if state == _BOTH else 0
            return self._byte(self.latched_count, state)
        state = self.read_state
        if state in (_BOTH, _BOTH_HIGH):
            self.read_state = _BOTH_HIGH if state == _BOTH else _BOTH
        return self._byte(self.current(), state)

    @staticmethod
    def _byte(count: int, state: int) -> int:
        return (count >> 8 if state in (_HIGH, _BOTH_HIGH) else count) & 0xFF

    def pack(self) -> bytes:
        """struct kvm_pit_channel_state."""
        return _STATE.pack(
            self.count, self.latched_count & 0xFFFF, self.count_latched, self.status_latched, self.status,
            self.read_state, self.write_state, self.write_latch, self.access, self.mode, self.bcd, self.gate,
            self.load_time,
        )  # fmt: skip

    def unpack(self, data: bytes) -> None:
        """A count of 0 is 65536; a mode that there is not counts like mode 2 and has the output of mode 0."""
        (
            count, self.latched_count, self.count_latched, self.status_latched, self.status, self.read_state,
            self.write_state, self.write_latch, self.access, self.mode, self.bcd, self.gate, self.load_time,
        ) = _STATE.unpack_from(data)  # fmt: skip
        self.count = count or 0x10000
