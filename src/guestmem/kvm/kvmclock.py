"""kvmclock: the paravirtual clock, of the VM and as each vCPU's guest has asked for it.

A guest writes the address of a page to an MSR; KVM writes there what its TSC was at which time of the clock, and with
which factor it goes on. As all TSCs here are one, the page says that it may be used without a loop over vCPUs
(PVCLOCK_TSC_STABLE_BIT), and it is written again only when somebody sets the clock or a TSC. KVM writes the wall clock
at once, here it is written before the guest goes on, which is when a guest can tell.

Source: Documentation/virt/kvm/x86/msr.rst; arch/x86/kvm/x86.c kvm_guest_time_update, kvm_write_wall_clock,
kvm_get_time_scale, kvm_vm_ioctl_set_clock, kvm_set_guest_paused; arch/x86/include/asm/pvclock-abi.h.
"""

from __future__ import annotations

import ctypes
import struct
import time
from typing import TYPE_CHECKING

from guestmem.kvm.protected.guest_page import map_guest
from guestmem.memory import PAGE_SIZE

if TYPE_CHECKING:
    from guestmem.kvm.vcpu import Vcpu
    from guestmem.sched import Timers

WALL_CLOCK, SYSTEM_TIME = 0x11, 0x12
WALL_CLOCK_NEW, SYSTEM_TIME_NEW = 0x4B56_4D00, 0x4B56_4D01
STOPS = (range(WALL_CLOCK, SYSTEM_TIME + 1), range(WALL_CLOCK_NEW, SYSTEM_TIME_NEW + 1))
MSRS = frozenset(index for range_ in STOPS for index in range_)
FLAG_TSC_STABLE, FLAG_REALTIME, FLAG_HOST_TSC = 2, 4, 8
CLOCK_FLAGS = FLAG_TSC_STABLE | FLAG_REALTIME | FLAG_HOST_TSC
"""Of struct kvm_clock_data."""
_NSEC = 1_000_000_000
_ENABLED = 1
_TIME_INFO = struct.Struct("<IIQQIbB2x")
"""struct pvclock_vcpu_time_info: version, pad, tsc_timestamp, system_time, tsc_to_system_mul, tsc_shift, flags."""
_TSC_STABLE_BIT, _GUEST_STOPPED = 1, 2
_WALL = struct.Struct("<III")  # version, sec, nsec


class KvmClock:
    """The clock of one VM: nanoseconds since it was made, until KVM_SET_CLOCK says otherwise."""

    def __init__(self, timers: Timers) -> None:
        self._timers = timers
        self._offset = -timers.now()

    def __fingerprint__(self) -> None:
        """What time it is is not state."""

    def now(self) -> int:
        return (self._timers.now() + self._offset) % (1 << 64)

    def set(self, nanoseconds: int) -> None:
        self._offset = nanoseconds - self._timers.now()


class VcpuClock:
    """The two MSRs of one vCPU, each of which has two numbers. `is_stale`: the page with the time is to be written
    before the guest goes on (KVM_REQ_CLOCK_UPDATE)."""

    def __init__(self, vcpu: Vcpu) -> None:
        self._vcpu = vcpu
        self.system_time = self.wall_clock = 0
        self.is_stale = False
        self._wall_is_stale = False
        self._version = 0
        self._stopped = False

    def __fingerprint__(self) -> tuple[object, ...]:
        return self.system_time, self.wall_clock, self.needs_update, self._stopped

    def read(self, index: int) -> int:
        return self.wall_clock if index in (WALL_CLOCK, WALL_CLOCK_NEW) else self.system_time

    def write(self, index: int, value: int) -> None:
        if index in (WALL_CLOCK, WALL_CLOCK_NEW):
            self.wall_clock, self._wall_is_stale = value, True
        else:
            self.system_time, self.is_stale = value, True

    @property
    def needs_update(self) -> bool:
        return self.is_stale or self._wall_is_stale

    def pause(self) -> bool:
        """KVM_KVMCLOCK_CTRL: tell the guest that it was stopped, for its watchdogs. False if it has no clock."""
        if not self.system_time & _ENABLED:
            return False
        self._stopped = self.is_stale = True
        return True

    async def update(self) -> None:
        """Write what is stale. Where there is no memory, nothing is written, as in KVM."""
        is_stale, wall_is_stale = self.is_stale, self._wall_is_stale
        self.is_stale = self._wall_is_stale = False
        if wall_is_stale:
            await self._write_wall_clock()
        if is_stale and self.system_time & _ENABLED:
            await self._write_time_info()

    async def _write_time_info(self) -> None:
        """The version is odd while the page is written; a guest of ours cannot see that, but those after it count."""
        address = await self._map(self.system_time & ~_ENABLED, _TIME_INFO.size)
        if address is None:
            return
        interrupts, clock = self._vcpu.interrupts, self._vcpu.kvm.clock
        self._version += 2
        multiplier, shift = time_scale(interrupts.tsc_khz * 1000)
        flags = _TSC_STABLE_BIT | (_GUEST_STOPPED if self._stopped else 0)
        self._stopped = False
        data = _TIME_INFO.pack(self._version, 0, interrupts.tsc(), clock.now(), multiplier, shift, flags)
        ctypes.memmove(address, data, len(data))

    async def _write_wall_clock(self) -> None:
        """The time of day at which the clock was zero."""
        address = await self._map(self.wall_clock, _WALL.size)
        if address is None:
            return
        version = int.from_bytes(ctypes.string_at(address, 4), "little")
        seconds, nanoseconds = divmod(time.time_ns() - self._vcpu.kvm.clock.now(), _NSEC)
        data = _WALL.pack((version | 1) + 1 & 0xFFFF_FFFF, seconds & 0xFFFF_FFFF, nanoseconds)
        ctypes.memmove(address, data, len(data))

    async def _map(self, gpa: int, size: int) -> int | None:
        """None too where it would cross a page: KVM maps one."""
        return await map_guest(self._vcpu.kvm, gpa) if gpa % PAGE_SIZE + size <= PAGE_SIZE else None


def time_scale(hertz: int) -> tuple[int, int]:
    """(multiplier, shift) with which ticks become nanoseconds: (ticks << shift) * multiplier >> 32. Source:
    kvm_get_time_scale."""
    shift = 0
    while hertz > 2 * _NSEC:
        hertz, shift = hertz >> 1, shift - 1
    while hertz <= _NSEC:
        hertz, shift = hertz << 1, shift + 1
    return (_NSEC << 32) // hertz, shift
