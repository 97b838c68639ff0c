"""Controllers without a guest: an IrqChip, a clock that is set by hand, and vCPUs that note what reaches them."""

from __future__ import annotations

from guestmem.kvm.irqchip import IrqChip, Lapic
from guestmem.kvm.irqchip import lapic_registers as reg
from guestmem.sched import ManualClock, Timers

ENABLED = 0x1FF


class Cpu:
    """A vCPU as its APIC sees it. Its TSC is the clock, at 2 GHz."""

    tsc_khz = 2_000_000

    def __init__(self, clock: ManualClock) -> None:
        self._clock = clock
        self.kicks = self.nmis = 0
        self.eoi_exits: list[int] = []

    def tsc(self) -> int:
        return self._clock.time * 2

    def kick(self) -> None:
        self.kicks += 1

    def inject_nmi(self) -> None:
        self.nmis += 1

    def request_eoi_exit(self, vector: int) -> None:
        self.eoi_exits.append(vector)


class Rig:
    """`count` APICs that are enabled by software."""

    def __init__(self, count: int = 1, *, is_split: bool = False, pins: int = 24) -> None:
        self.clock = ManualClock(1_000_000_000)
        self.timers = Timers(self.clock)
        self.chip = IrqChip(self.timers, is_split, pins if is_split else 0)
        self.cpus = [Cpu(self.clock) for _ in range(count)]
        self.lapics = [self.chip.new_lapic(n, cpu, is_bsp=not n) for n, cpu in enumerate(self.cpus)]
        for lapic in self.lapics:
            lapic.has_x2apic = lapic.has_tsc_deadline = True
            lapic.write(reg.SVR, ENABLED)

    def advance(self, nanoseconds: int) -> None:
        """Timers fire one after another, each at its own time."""
        end = self.clock.time + nanoseconds
        while (deadline := self.timers.next_deadline) is not None and deadline <= end:
            self.clock.time = max(self.clock.time, deadline)
            self.timers.fire_due()
        self.clock.time = end

    def program_pin(self, pin: int, entry: int) -> None:
        ioapic = self.chip.ioapic
        assert ioapic is not None
        for half in (1, 0):
            ioapic.mmio_write(0, 4, 0x10 + 2 * pin + half)
            ioapic.mmio_write(0x10, 4, entry >> 32 * half & 0xFFFF_FFFF)

    def take(self, which: int = 0) -> int:
        """The vCPU takes what is pending and ends it at once; -1 if nothing is."""
        vector = self.lapics[which].acknowledge()
        if vector >= 0:
            self.lapics[which].write(reg.EOI, 0)
        return vector


def x2apic(lapic: Lapic) -> None:
    assert lapic.set_base(lapic.base | reg.BASE_X2APIC, from_guest=True)
