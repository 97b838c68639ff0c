"""VcpuDevices: what a vCPU's port and MMIO accesses meet in the kernel, so that they are no exits.

Source: virt/kvm/kvm_main.c kvm_io_bus_write, kvm_io_bus_read; arch/x86/kvm/x86.c vcpu_mmio_write, vcpu_mmio_read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from guestmem.cpu.engine import MmioRead, MmioWrite, PortIn, PortOut
from guestmem.kvm.irqchip.chip import Ports
from guestmem.kvm.irqchip.ioapic import LENGTH as IOAPIC_LENGTH
from guestmem.kvm.irqchip.ioapic import IoApic
from guestmem.kvm.irqchip.lapic import Lapic
from guestmem.kvm.irqchip.lapic_registers import TPR
from guestmem.memory import PAGE_SIZE
from guestmem.uapi.kvm import MAX_PHYSICAL_ADDRESS_BITS

if TYPE_CHECKING:
    from guestmem.kvm.vcpu import Vcpu

_PHYSICAL = (1 << MAX_PHYSICAL_ADDRESS_BITS) - 1


class VcpuDevices:
    """Without a state of its own: the controllers are the VM's, the local APIC is the vCPU's."""

    def __init__(self, vcpu: Vcpu) -> None:
        self._vcpu = vcpu

    def __fingerprint__(self) -> None:
        """Nothing of its own."""

    def has_port(self, port: int) -> bool:
        """Whether a controller has this port."""
        return self._port(port) is not None

    def at(self, gpa: int) -> bool:
        """Whether a controller is at this address, where there is no memory."""
        return self._mmio(gpa)[0] is not None

    def write_port(self, stop: PortOut) -> bool:
        """Whether somebody took it."""
        device = self._port(stop.port)
        if device is None:
            return self._taken(stop.port, stop.size, stop.value, is_port=True)
        device.write(stop.port, stop.size, stop.value)
        return True

    def read_port(self, stop: PortIn) -> bool:
        """Whether the engine has its answer."""
        device = self._port(stop.port)
        if device is None:
            return False
        mask = (1 << 8 * stop.size) - 1
        values = (device.read(stop.port, stop.size) & mask for _ in range(stop.count))
        self._vcpu.engine.complete(sum(value << 8 * stop.size * place for place, value in enumerate(values)))
        return True

    def write_mmio(self, stop: MmioWrite) -> bool:
        """Whether somebody took it."""
        device, offset = self._mmio(stop.gpa)
        if device is None:
            return self._taken(stop.gpa, stop.size, stop.value, is_port=False)
        device.mmio_write(offset, stop.size, stop.value)
        if offset >> 4 == TPR and device is self._vcpu.lapic:
            self._vcpu.interrupts.give_tpr()
        return True

    def read_mmio(self, stop: MmioRead) -> bool:
        """Whether the engine has its answer."""
        device, offset = self._mmio(stop.gpa)
        if device is None:
            return False
        self._vcpu.engine.complete(device.mmio_read(offset, stop.size))
        return True

    def _port(self, port: int) -> Ports | None:
        irqchip = self._vcpu.kvm.irqchip
        return irqchip.ports.get(port) if irqchip is not None else None

    def _mmio(self, gpa: int) -> tuple[Lapic | IoApic | None, int]:
        """What is at `gpa` besides memory, and how far into it."""
        lapic, irqchip = self._vcpu.lapic, self._vcpu.kvm.irqchip
        if lapic is None or irqchip is None:
            return None, 0
        if gpa & -PAGE_SIZE == lapic.base & -PAGE_SIZE & _PHYSICAL:
            return lapic, gpa & PAGE_SIZE - 1
        ioapic = irqchip.ioapic
        if ioapic is not None and 0 <= gpa - ioapic.base < IOAPIC_LENGTH:
            return ioapic, gpa - ioapic.base
        return None, 0

    def _taken(self, address: int, size: int, value: int, is_port: bool) -> bool:
        """By an ioeventfd, or a ring of coalesced writes."""
        return any(device.write(address, size, value, is_port) for device in self._vcpu.kvm.io_devices)
