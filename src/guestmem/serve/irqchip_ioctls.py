"""ioctls of a VM about interrupts and time: the controllers, GSI routing, lines, MSIs, the PIT, kvmclock.

Source: arch/x86/kvm/x86.c kvm_arch_vm_ioctl, kvm_vm_ioctl_enable_cap; virt/kvm/kvm_main.c kvm_vm_ioctl.
"""

from __future__ import annotations

import errno
import struct
import time

from guestmem.cpu.msrs import TSC_KHZ
from guestmem.kvm import kvmclock
from guestmem.kvm.irqchip import USERSPACE_SOURCE, IrqChip, MsiRoute, routing
from guestmem.kvm.irqchip.chip import STATE_SIZE, X2APIC_NO_SUPPRESS_EOI, X2APIC_SUPPRESS_EOI
from guestmem.kvm.irqchip.pit import STATE_SIZE as PIT_STATE_SIZE
from guestmem.kvm.irqchip.pit import Pit
from guestmem.kvm.vm import Kvm
from guestmem.serve import irqfd
from guestmem.serve.call import Call
from guestmem.serve.files import VmFile
from guestmem.trace import Refusal
from guestmem.uapi import kvm as uapi
from guestmem.uapi.kvm import VmType

_PROTECTED_EOI = (VmType.TDX,)
_IRQ_LEVEL = struct.Struct("<II")  # irq or status, level
_CHIP_HEAD = struct.Struct("<II")
_ROUTING_HEAD = struct.Struct("<II")  # nr, flags
_MSI = struct.Struct("<5I12x")  # address_lo, address_hi, data, flags, devid
_MSI_VALID_DEVID = 1
_PIT_SPEAKER = 1
_COUNTERS_SIZE = 72
_CHIPS = 3
_CLOCK = struct.Struct("<QIIQQ16x")  # clock, flags, pad, realtime, host_tsc
_CLOCK_FLAGS = kvmclock.FLAG_TSC_STABLE | kvmclock.FLAG_REALTIME | kvmclock.FLAG_HOST_TSC


def _kvm(call: Call) -> Kvm:
    assert isinstance(call.file, VmFile)
    return call.file.kvm


# Making them


async def _create_irqchip(call: Call, argument: int) -> int:
    """Raises: Refusal EEXIST `irqchip.exists`; ENOTTY `irqchip.protected`; EINVAL `irqchip.late` after vCPUs."""
    kvm = _kvm(call)
    _check_no_irqchip(kvm)
    if kvm.vm_type in _PROTECTED_EOI:
        raise Refusal(errno.ENOTTY, "irqchip.protected", vm=kvm.number)
    if kvm.created_vcpus:
        raise Refusal(errno.EINVAL, "irqchip.late", vcpus=kvm.created_vcpus)
    _install(kvm, IrqChip(kvm.scheduler.timers))
    return 0


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


def _install(kvm: Kvm, irqchip: IrqChip) -> None:
    irqchip.set_x2apic_api(kvm.x2apic_api)
    kvm.irqchip = irqchip


def x2apic_api(kvm: Kvm, flags: int) -> None:
    """KVM_CAP_X2APIC_API, before or after there are controllers. Raises: Refusal EINVAL `x2apic_api.eoi`, for both of
    the flags about EOI broadcasts, or where the IOAPIC that would hear of them is the kernel's."""
    about_eoi = flags & (X2APIC_SUPPRESS_EOI | X2APIC_NO_SUPPRESS_EOI)
    is_split = kvm.irqchip is not None and kvm.irqchip.is_split
    if about_eoi.bit_count() == 2 or (flags & X2APIC_SUPPRESS_EOI and not is_split):
        raise Refusal(errno.EINVAL, "x2apic_api.eoi", flags=flags)
    kvm.x2apic_api |= flags
    if kvm.irqchip is not None:
        kvm.irqchip.set_x2apic_api(kvm.x2apic_api)


def _check_no_irqchip(kvm: Kvm) -> None:
    if kvm.apic_in_kernel:
        raise Refusal(errno.EEXIST, "irqchip.exists", vm=kvm.number)


async def _set_boot_cpu_id(call: Call, number: int) -> int:
    """Raises: Refusal EBUSY `boot_cpu.late`; EINVAL `vcpu.number`."""
    kvm = _kvm(call)
    if kvm.created_vcpus:
        raise Refusal(errno.EBUSY, "boot_cpu.late", vcpus=kvm.created_vcpus)
    if number > kvm.max_vcpu_ids:  # KVM lets the first that there cannot be pass
        raise Refusal(errno.EINVAL, "vcpu.number", vcpu=number, limit=kvm.max_vcpu_ids)
    kvm.bsp_vcpu_id = number
    return 0


# State


def _full_irqchip(kvm: Kvm) -> IrqChip:
    """Raises: Refusal ENXIO `irqchip.none`."""
    if kvm.irqchip is None or kvm.irqchip.is_split:
        raise Refusal(errno.ENXIO, "irqchip.none", vm=kvm.number)
    return kvm.irqchip


def _check_chip(chip: int) -> None:
    if chip >= _CHIPS:
        raise Refusal(errno.EINVAL, "ioctl.argument", chip=chip)


async def _get_irqchip(call: Call, argument: int) -> int:
    """struct kvm_irqchip: id, padding, 512 bytes of state."""
    chip, _ = _CHIP_HEAD.unpack(await call.client.memory.copy_from_user(argument, _CHIP_HEAD.size))
    irqchip = _full_irqchip(_kvm(call))
    _check_chip(chip)
    await call.client.memory.copy_to_user(argument + _CHIP_HEAD.size, irqchip.get_state(chip))
    return 0


async def _set_irqchip(call: Call, argument: int) -> int:
    data = await call.client.memory.copy_from_user(argument, _CHIP_HEAD.size + STATE_SIZE)
    chip, _ = _CHIP_HEAD.unpack_from(data)
    irqchip = _full_irqchip(_kvm(call))
    _check_chip(chip)
    irqchip.set_state(chip, data[_CHIP_HEAD.size :])
    return 0


async def _create_pit2(call: Call, argument: int) -> int:
    """Raises: as _new_pit."""
    (flags,) = struct.unpack_from("<I", await call.client.memory.copy_from_user(argument, 64))
    return _new_pit(_kvm(call), bool(flags & _PIT_SPEAKER))


async def _create_pit(call: Call, argument: int) -> int:
    """The older call, with the speaker's port. Raises: as _new_pit."""
    return _new_pit(_kvm(call), has_speaker=True)


def _new_pit(kvm: Kvm, has_speaker: bool) -> int:
    """Raises: Refusal EEXIST `irqchip.exists`; ENOENT `pit.no_pic` without an 8259A to tick at."""
    if kvm.irqchip is not None and kvm.irqchip.pit is not None:
        raise Refusal(errno.EEXIST, "irqchip.exists", vm=kvm.number)
    if kvm.irqchip is None or kvm.irqchip.pic is None:
        raise Refusal(errno.ENOENT, "pit.no_pic", vm=kvm.number)
    kvm.irqchip.create_pit(has_speaker)
    return 0


def _pit(kvm: Kvm) -> Pit:
    """Raises: Refusal ENXIO `pit.none`."""
    if kvm.irqchip is None or kvm.irqchip.pit is None:
        raise Refusal(errno.ENXIO, "pit.none", vm=kvm.number)
    return kvm.irqchip.pit


async def _get_pit(call: Call, argument: int) -> int:
    """struct kvm_pit_state: the counters alone."""
    await call.client.memory.copy_to_user(argument, _pit(_kvm(call)).pack()[:_COUNTERS_SIZE])
    return 0


async def _set_pit(call: Call, argument: int) -> int:
    data = await call.client.memory.copy_from_user(argument, _COUNTERS_SIZE)
    pit = _pit(_kvm(call))
    pit.unpack(data + pit.pack()[_COUNTERS_SIZE:])
    return 0


async def _get_pit2(call: Call, argument: int) -> int:
    await call.client.memory.copy_to_user(argument, _pit(_kvm(call)).pack())
    return 0


async def _set_pit2(call: Call, argument: int) -> int:
    data = await call.client.memory.copy_from_user(argument, PIT_STATE_SIZE)
    _pit(_kvm(call)).unpack(data)
    return 0


async def _reinject_control(call: Call, argument: int) -> int:
    """struct kvm_reinject_control: pit_reinject is its first byte."""
    data = await call.client.memory.copy_from_user(argument, 32)
    _pit(_kvm(call)).set_reinject(bool(data[0]))
    return 0


# Interrupts


async def _irq_line(call: Call, argument: int) -> int:
    """KVM_IRQ_LINE. Raises: Refusal ENXIO `irqchip.none`."""
    gsi, level = _IRQ_LEVEL.unpack(await call.client.memory.copy_from_user(argument, _IRQ_LEVEL.size))
    _any_irqchip(_kvm(call)).set_irq(gsi, USERSPACE_SOURCE, bool(level))
    return 0


async def _irq_line_status(call: Call, argument: int) -> int:
    """And how many interrupts came of it, in the place of the GSI."""
    gsi, level = _IRQ_LEVEL.unpack(await call.client.memory.copy_from_user(argument, _IRQ_LEVEL.size))
    status = _any_irqchip(_kvm(call)).set_irq(gsi, USERSPACE_SOURCE, bool(level))
    await call.client.memory.copy_to_user(argument, _IRQ_LEVEL.pack(status & 0xFFFF_FFFF, level))
    return 0


def _any_irqchip(kvm: Kvm) -> IrqChip:
    if kvm.irqchip is None:
        raise Refusal(errno.ENXIO, "irqchip.none", vm=kvm.number)
    return kvm.irqchip


async def _set_gsi_routing(call: Call, argument: int) -> int:
    """Raises: Refusal EINVAL `routing.no_irqchip`, `routing.table`; as parse_routes."""
    memory, kvm = call.client.memory, _kvm(call)
    count, flags = _ROUTING_HEAD.unpack(await memory.copy_from_user(argument, _ROUTING_HEAD.size))
    if kvm.irqchip is None:
        raise Refusal(errno.EINVAL, "routing.no_irqchip", vm=kvm.number)
    if count > routing.MAX_ROUTES or flags:
        raise Refusal(errno.EINVAL, "routing.table", entries=count, flags=flags)
    entries = await memory.copy_from_user(argument + _ROUTING_HEAD.size, count * routing.ENTRY.size) if count else b""
    irqchip = kvm.irqchip
    irqchip.set_routes(routing.parse_routes(entries, irqchip.is_split, irqchip.has_32_bit_ids))
    return 0


async def _signal_msi(call: Call, argument: int) -> int:
    """How many APICs took it.

    Raises: Refusal EINVAL `msi.no_irqchip`, `msi.flags`, `msi.address`; EPERM `msi.nobody`: there is no APIC yet.
    """
    low, high, data, flags, _ = _MSI.unpack(await call.client.memory.copy_from_user(argument, _MSI.size))
    kvm = _kvm(call)
    if kvm.irqchip is None:
        raise Refusal(errno.EINVAL, "msi.no_irqchip", vm=kvm.number)
    if flags & ~_MSI_VALID_DEVID:
        raise Refusal(errno.EINVAL, "msi.flags", flags=flags)
    route = MsiRoute(low, high, data)
    route.check(kvm.irqchip.has_32_bit_ids)
    taken = kvm.irqchip.send_msi(route)
    if taken < 0:
        raise Refusal(errno.EPERM, "msi.nobody", address=low, data=data)
    return taken


# Time


async def _get_clock(call: Call, argument: int) -> int:
    """kvmclock, and what it was read against."""
    kvm = _kvm(call)
    now, realtime, host_tsc = kvm.clock.now(), time.time_ns(), time.monotonic_ns() * TSC_KHZ // 1_000_000
    await call.client.memory.copy_to_user(argument, _CLOCK.pack(now, _CLOCK_FLAGS, 0, realtime, host_tsc))
    return 0


async def _set_clock(call: Call, argument: int) -> int:
    """With KVM_CLOCK_REALTIME the time since `realtime` is added. Source: kvm_vm_ioctl_set_clock."""
    clock, flags, _, realtime, _ = _CLOCK.unpack(await call.client.memory.copy_from_user(argument, _CLOCK.size))
    if flags & ~kvmclock.FLAG_REALTIME:
        raise Refusal(errno.EINVAL, "ioctl.argument", flags=flags)
    kvm = _kvm(call)
    kvm.clock.set(clock + (max(0, time.time_ns() - realtime) if flags else 0))
    for vcpu in kvm.vcpus.values():
        vcpu.clock.is_stale = True
        vcpu.interrupts.kick()
    return 0


TABLE = {
    uapi.KVM_CREATE_IRQCHIP: _create_irqchip,
    uapi.KVM_GET_IRQCHIP: _get_irqchip,
    uapi.KVM_SET_IRQCHIP: _set_irqchip,
    uapi.KVM_SET_BOOT_CPU_ID: _set_boot_cpu_id,
    uapi.KVM_IRQ_LINE: _irq_line,
    uapi.KVM_IRQ_LINE_STATUS: _irq_line_status,
    uapi.KVM_SET_GSI_ROUTING: _set_gsi_routing,
    uapi.KVM_SIGNAL_MSI: _signal_msi,
    uapi.KVM_IRQFD: irqfd.irqfd,
    uapi.KVM_CREATE_PIT: _create_pit,
    uapi.KVM_GET_PIT: _get_pit,
    uapi.KVM_SET_PIT: _set_pit,
    uapi.KVM_CREATE_PIT2: _create_pit2,
    uapi.KVM_GET_PIT2: _get_pit2,
    uapi.KVM_SET_PIT2: _set_pit2,
    uapi.KVM_REINJECT_CONTROL: _reinject_control,
    uapi.KVM_GET_CLOCK: _get_clock,
    uapi.KVM_SET_CLOCK: _set_clock,
}
