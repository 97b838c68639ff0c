"""Pit: an 8254 as a PC has it. Counter 0 is on IRQ 0; counter 2 is gated and seen at port 0x61, with the speaker.

With `reinject` a tick that the guest has not ended yet holds the next ones back, and they are counted and follow, so
that a guest which counts ticks loses no time; without, a tick is an edge and no more. The interrupt is a timer: OUT of
counter 0 is never sampled.

Source: arch/x86/kvm/i8254.c create_pit_timer, pit_timer_fn, pit_do_work, kvm_pit_ack_irq, kvm_pit_set_reinject,
speaker_ioport_read.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable

from guestmem.kvm.irqchip.lapic_timer import MIN_PERIOD_NS
from guestmem.kvm.irqchip.pit_counter import FREQUENCY, NSEC_PER_SEC, PitCounter
from guestmem.kvm.irqchip.pit_counter import STATE_SIZE as COUNTER_SIZE
from guestmem.sched import Timers

IRQ = 0
PORTS, SPEAKER_PORT = range(0x40, 0x44), 0x61
FLAG_HPET_LEGACY, FLAG_SPEAKER_DATA_ON = 1 << 0, 1 << 1
STATE_SIZE = 3 * COUNTER_SIZE + 40
_PERIODIC, _ONE_SHOT = (2, 3), (0, 1, 4)
_FLAGS = struct.Struct("<I36x")


class Pit:
    """`tick` sends one interrupt. `has_speaker`: port 0x61 is here (KVM_PIT_SPEAKER_DUMMY)."""

    def __init__(self, timers: Timers, tick: Callable[[], None], has_speaker: bool) -> None:
        self._timers = timers
        self._tick = tick
        self._timer = timers.new(self._expired)
        self.has_speaker = has_speaker
        self.flags = 0
        self.reinject = True
        self._period = self._deadline = 0
        self._pending, self._acked = 0, True
        self.counters = (
            PitCounter(self._elapsed_of_irq),
            *(PitCounter(functools.partial(self._elapsed, which)) for which in (1, 2)),
        )
        self.reset()

    def reset(self) -> None:
        """No mode is programmed, so nothing ticks. Source: kvm_pit_reset."""
        self.flags = 0
        for which, counter in enumerate(self.counters):
            counter.mode, counter.gate = 0xFF, int(which != 2)
            self._load(which, 0)
        self._forget_ticks()

    def close(self) -> None:
        """The VM is no more. Source: kvm_free_pit."""
        self._timer.cancel()

    # The interrupt

    def set_reinject(self, reinject: bool) -> None:
        """KVM_REINJECT_CONTROL."""
        if reinject and not self.reinject:
            self._forget_ticks()
        self.reinject = reinject

    def acked(self) -> None:
        """The guest has ended IRQ 0. Source: kvm_pit_ack_irq."""
        if not self.reinject:
            return
        self._acked = True
        if self._pending:
            self._pending -= 1
            if self._pending:
                self._send()

    def masked(self, is_masked: bool) -> None:
        """An end of a tick that came while IRQ 0 was masked never comes. Source: pit_mask_notifer."""
        if not is_masked and self.reinject:
            self._forget_ticks()

    def _forget_ticks(self) -> None:
        self._pending, self._acked = 0, True

    def _expired(self) -> None:
        """Source: pit_timer_fn."""
        deadline = self._deadline
        if self.reinject:
            self._pending += 1
        if self.counters[0].mode in _PERIODIC:
            late = max(0, self._timers.now() - deadline)
            self._start(deadline + (late // self._period + 1) * self._period)
        self._send()

    def _send(self) -> None:
        """Source: pit_do_work."""
        if self.reinject and not self._acked:
            return
        self._acked = False
        self._tick()

    # Counting

    def _load(self, which: int, value: int) -> None:
        """Source: pit_load_count."""
        counter = self.counters[which]
        counter.count = value or 0x10000
        counter.load_time = self._timers.now()
        if which:
            return
        self._timer.cancel()
        if self.flags & FLAG_HPET_LEGACY or counter.mode not in _PERIODIC + _ONE_SHOT:
            return
        self._forget_ticks()
        self._period = counter.count * NSEC_PER_SEC // FREQUENCY
        if counter.mode in _PERIODIC:
            self._period = max(self._period, MIN_PERIOD_NS)
        self._start(self._timers.now() + self._period)

    def _start(self, deadline: int) -> None:
        self._deadline = deadline
        self._timer.start(deadline)

    def _elapsed(self, which: int) -> int:
        return max(0, self._timers.now() - self.counters[which].load_time)

    def _elapsed_of_irq(self) -> int:
        """Of counter 0, by its timer: it is what the guest compares its interrupts with. Source: __kpit_elapsed."""
        return self._period - (self._deadline - self._timers.now()) if self._period else 0

    # Ports

    def read(self, port: int, size: int) -> int:
        """A byte, whatever the size."""
        if port == SPEAKER_PORT:
            counter = self.counters[2]
            refresh = self._timers.now() >> 14 & 1  # toggles at about 15 us
            data = bool(self.flags & FLAG_SPEAKER_DATA_ON)
            return data << 1 | counter.gate | counter.output() << 5 | refresh << 4
        return self.counters[port & 3].read() if port & 3 != 3 else 0

    def write(self, port: int, size: int, value: int) -> None:
        value &= 0xFF
        if port == SPEAKER_PORT:
            self.flags = self.flags & ~FLAG_SPEAKER_DATA_ON | (FLAG_SPEAKER_DATA_ON if value & 2 else 0)
            self.counters[2].set_gate(value & 1, self._timers.now())
        elif port & 3 == 3:
            self._control(value)
        else:
            count = self.counters[port & 3].write(value)
            if count is not None:
                self._load(port & 3, count)

    def _control(self, value: int) -> None:
        which = value >> 6
        if which != 3:
            self.counters[which].program(value)
            return
        for place, counter in enumerate(self.counters):  # read-back
            if value & 2 << place:
                if not value & 0x20:
                    counter.latch_count()
                if not value & 0x10:
                    counter.latch_status()

    # State

    def pack(self) -> bytes:
        """struct kvm_pit_state2."""
        return b"".join(counter.pack() for counter in self.counters) + _FLAGS.pack(self.flags)

    def unpack(self, data: bytes) -> None:
        """Every counter starts over with its count; counter 0 is silent from when an HPET takes its place. Source:
        kvm_vm_ioctl_set_pit2."""
        (self.flags,) = _FLAGS.unpack_from(data, 3 * COUNTER_SIZE)
        for which, counter in enumerate(self.counters):
            counter.unpack(data[which * COUNTER_SIZE :])
            self._load(which, counter.count)
