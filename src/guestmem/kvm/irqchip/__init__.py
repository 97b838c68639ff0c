"""Interrupt controllers in the kernel: what KVM_CREATE_IRQCHIP and KVM_CAP_SPLIT_IRQCHIP make.

State machines after the manuals, which know neither vCPUs nor clients nor guest memory: `lapic` with its `lapic_timer`,
`ioapic`, `pic`, `pit` with its `pit_counter`; `apic_bus` carries messages to APICs, `routing` says where a GSI goes,
`chip` wires them up. Their time is the scheduler's `timers`. What a vCPU does about them is in kvm/vcpu_interrupts.py.
"""

from guestmem.kvm.irqchip.chip import RESAMPLE_SOURCE, USERSPACE_SOURCE, IrqChip
from guestmem.kvm.irqchip.lapic import Lapic
from guestmem.kvm.irqchip.routing import MsiRoute

__all__ = ["RESAMPLE_SOURCE", "USERSPACE_SOURCE", "IrqChip", "Lapic", "MsiRoute"]
