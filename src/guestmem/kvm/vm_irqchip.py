"""The interrupt controllers of a VM: made once, before its vCPUs, and how they are found.

Source: arch/x86/kvm/x86.c kvm_arch_vm_ioctl, kvm_vm_ioctl_enable_cap.
"""

from __future__ import annotations

import errno

from guestmem.kvm.irqchip import IrqChip, routing
from guestmem.kvm.irqchip.chip import X2APIC_NO_SUPPRESS_EOI, X2APIC_SUPPRESS_EOI
from guestmem.kvm.irqchip.pit import Pit
from guestmem.kvm.vm import Kvm
from guestmem.trace import Refusal
from guestmem.uapi.kvm import VmType

_PROTECTED_EOI = (VmType.TDX,)


def create_irqchip(kvm: Kvm) -> None:
    """KVM_CREATE_IRQCHIP. Raises: Refusal EEXIST `irqchip.exists`; ENOTTY `irqchip.protected`; EINVAL `irqchip.late`
    after vCPUs."""
    _check_no_irqchip(kvm)
    if kvm.vm_type in _PROTECTED_EOI:
        raise Refusal(errno.ENOTTY, "irqchip.protected", vm=kvm.number)
    if kvm.created_vcpus:
        raise Refusal(errno.EINVAL, "irqchip.late", vcpus=kvm.created_vcpus)
    _install(kvm, IrqChip(kvm.scheduler.timers))


def split_irqchip(kvm: Kvm, pins: int) -> None:
    """KVM_CAP_SPLIT_IRQCHIP: the APICs are the kernel's, the other controllers the VMM's, whose IOAPIC has `pins` GSIs.

    Raises: Refusal EINVAL `irqchip.pins`; EEXIST `irqchip.exists`, `irqchip.split_late`.
    """
    if pins > routing.MAX_ROUTES:
        raise Refusal(errno.EINVAL, "irqchip.pins", pins=pins, limit=routing.MAX_ROUTES)
    _check_no_irqchip(kvm)
    if kvm.created_vcpus:
        raise Refusal(errno.EEXIST, "irqchip.split_late", vcpus=kvm.created_vcpus)
    _install(kvm, IrqChip(kvm.scheduler.timers, is_split=True, reserved_pins=pins))


def _check_no_irqchip(kvm: Kvm) -> None:
    if kvm.apic_in_kernel:
        raise Refusal(errno.EEXIST, "irqchip.exists", vm=kvm.number)


def _install(kvm: Kvm, irqchip: IrqChip) -> None:
    irqchip.set_x2apic_api(kvm.x2apic_api)
    kvm.irqchip = irqchip


def enable_x2apic_api(kvm: Kvm, flags: int) -> None:
    """KVM_CAP_X2APIC_API, before or after there are controllers. Raises: Refusal EINVAL `x2apic_api.eoi`, for both of
    the flags about EOI broadcasts, or where the IOAPIC that would hear of them is the kernel's."""
    about_eoi = flags & (X2APIC_SUPPRESS_EOI | X2APIC_NO_SUPPRESS_EOI)
    is_split = kvm.irqchip is not None and kvm.irqchip.is_split
    if about_eoi.bit_count() == 2 or (flags & X2APIC_SUPPRESS_EOI and not is_split):
        raise Refusal(errno.EINVAL, "x2apic_api.eoi", flags=flags)
    kvm.x2apic_api |= flags
    if kvm.irqchip is not None:
        kvm.irqchip.set_x2apic_api(kvm.x2apic_api)


def set_boot_cpu(kvm: Kvm, number: int) -> None:
    """KVM_SET_BOOT_CPU_ID. Raises: Refusal EBUSY `boot_cpu.late`; EINVAL `vcpu.number`."""
    if kvm.created_vcpus:
        raise Refusal(errno.EBUSY, "boot_cpu.late", vcpus=kvm.created_vcpus)
    if number > kvm.max_vcpu_ids:  # KVM lets the first that there cannot be pass
        raise Refusal(errno.EINVAL, "vcpu.number", vcpu=number, limit=kvm.max_vcpu_ids)
    kvm.bsp_vcpu_id = number


def create_pit(kvm: Kvm, has_speaker: bool) -> None:
    """KVM_CREATE_PIT2. Raises: Refusal EEXIST `irqchip.exists`; ENOENT `pit.no_pic` without an 8259A to tick at."""
    if kvm.irqchip is not None and kvm.irqchip.pit is not None:
        raise Refusal(errno.EEXIST, "irqchip.exists", vm=kvm.number)
    if kvm.irqchip is None or kvm.irqchip.pic is None:
        raise Refusal(errno.ENOENT, "pit.no_pic", vm=kvm.number)
    kvm.irqchip.create_pit(has_speaker)


def any_irqchip(kvm: Kvm) -> IrqChip:
    """Raises: Refusal ENXIO `irqchip.none`."""
    if kvm.irqchip is None:
        raise Refusal(errno.ENXIO, "irqchip.none", vm=kvm.number)
    return kvm.irqchip


def full_irqchip(kvm: Kvm) -> IrqChip:
    """With the IOAPIC and the 8259A. Raises: Refusal ENXIO `irqchip.none`."""
    irqchip = any_irqchip(kvm)
    if irqchip.is_split:
        raise Refusal(errno.ENXIO, "irqchip.none", vm=kvm.number)
    return irqchip


def pit_of(kvm: Kvm) -> Pit:
    """Raises: Refusal ENXIO `pit.none`."""
    if kvm.irqchip is None or kvm.irqchip.pit is None:
        raise Refusal(errno.ENXIO, "pit.none", vm=kvm.number)
    return kvm.irqchip.pit
