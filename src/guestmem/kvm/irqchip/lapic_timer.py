"""LapicTimer: the local APIC's timer, in its three modes.

The counter is not counted: a count is the time that is left until `expiry`. One tick of the bus is a nanosecond, as in
KVM (APIC_BUS_CYCLE_NS). A periodic timer whose vCPU was late loses what it missed: all of it would meet in one bit of
IRR anyhow.

Source: arch/x86/kvm/lapic.c start_apic_timer, apic_get_tmcct, apic_update_lvtt, limit_periodic_timer_frequency; Intel
SDM vol. 3, 11.5.4 "APIC timer".
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Protocol

from guestmem.sched import Timers

MIN_PERIOD_NS = 200_000
"""Of a periodic timer: the module parameter min_timer_period_us."""


class TimerMode(enum.IntEnum):
    """Bits 18:17 of the timer's LVT entry."""

    ONE_SHOT = 0
    PERIODIC = 1
    TSC_DEADLINE = 2
    RESERVED = 3


class TimeStampCounter(Protocol):
    """The guest's TSC."""

    def tsc(self) -> int:
        """Now."""
        ...

    @property
    def tsc_khz(self) -> int: ...


class LapicTimer:
    """`mode` is set by LVT, `divide` (2 to the power of what) by DIVIDE. `on_expiry` is called when it is zero."""

    def __init__(self, timers: Timers, counter: TimeStampCounter, on_expiry: Callable[[], None]) -> None:
        self._timers = timers
        self._timer = timers.new(self._expired)
        self._counter = counter
        self._on_expiry = on_expiry
        self.mode = TimerMode.ONE_SHOT
        self.initial_count = 0
        self.divide = 0
        self.tsc_deadline = 0
        self.expiry = 0

    @property
    def period(self) -> int:
        """Nanoseconds. Source: set_target_expiration, limit_periodic_timer_frequency."""
        period = self.initial_count << self.divide
        return max(period, MIN_PERIOD_NS) if self.mode == TimerMode.PERIODIC and period else period

    @property
    def current_count(self) -> int:
        """The register; 0 in TSC-deadline mode, and once a one-shot is over."""
        if not self._timer.deadline or self.mode == TimerMode.TSC_DEADLINE or not self.initial_count:
            return 0
        return min(max(0, self.expiry - self._timers.now()) >> self.divide, 0xFFFF_FFFF)

    def set_mode(self, mode: TimerMode) -> None:
        """Into or out of TSC-deadline mode the timer is disarmed."""
        if mode == self.mode:
            return
        if TimerMode.TSC_DEADLINE in (mode, self.mode):
            self.stop()
        self.mode = mode

    def set_divide(self, register: int) -> None:
        """The DIVIDE register; a running count goes on from where it is. Source: update_divide_count."""
        count, running = self.current_count, self._timer.deadline is not None
        self.divide = ((register & 3 | register >> 1 & 4) + 1) & 7
        if running and self.mode != TimerMode.TSC_DEADLINE:
            self._start_at(self._timers.now() + (count << self.divide))

    def set_initial_count(self, count: int) -> None:
        """0 stops it. Ignored in TSC-deadline mode."""
        if self.mode == TimerMode.TSC_DEADLINE:
            return
        self._timer.cancel()
        self.initial_count = count
        if count:
            self._start_at(self._timers.now() + self.period)

    def set_tsc_deadline(self, value: int) -> None:
        """MSR 0x6e0. 0 disarms; a time that is over fires at once. Ignored in the other modes."""
        if self.mode != TimerMode.TSC_DEADLINE:
            return
        self._timer.cancel()
        self.tsc_deadline = value
        if value:
            ahead = max(0, value - self._counter.tsc())
            self._start_at(self._timers.now() + ahead * 1_000_000 // self._counter.tsc_khz)

    def restore(self, initial_count: int, current_count: int) -> None:
        """What KVM_SET_LAPIC brings: the next expiry is as far off as the count says. Source: apic_set_lapic's
        start_apic_timer(apic, APIC_TMCCT)."""
        if self.mode == TimerMode.TSC_DEADLINE:
            return
        self._timer.cancel()
        self.initial_count = initial_count
        if initial_count and (current_count or self.mode == TimerMode.PERIODIC):
            ahead = current_count << self.divide if current_count else self.period
            self._start_at(self._timers.now() + ahead)

    def tsc_changed(self) -> None:
        """The guest's TSC was set: what waits for it is elsewhere now. Source: restart_apic_timer."""
        if self.tsc_deadline:
            self.set_tsc_deadline(self.tsc_deadline)

    def stop(self) -> None:
        """Source: cancel_apic_timer."""
        self._timer.cancel()
        self.initial_count = self.tsc_deadline = 0

    def _start_at(self, expiry: int) -> None:
        self.expiry = expiry
        self._timer.start(expiry)

    def _expired(self) -> None:
        if self.mode == TimerMode.PERIODIC:
            late = self._timers.now() - self.expiry
            self._start_at(self.expiry + (late // self.period + 1) * self.period)
        self.tsc_deadline = 0
        self._on_expiry()
