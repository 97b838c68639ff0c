"""ioctls of a VM about interrupts and time: the controllers, GSI routing, lines, MSIs, the PIT, kvmclock.

Source: arch/x86/kvm/x86.c kvm_arch_vm_ioctl, kvm_vm_ioctl_enable_cap; virt/kvm/kvm_main.c kvm_vm_ioctl.
"""

from __future__ import annotations

import errno
import struct
import time

from guestmem.cpu.msrs import TSC_KHZ
from guestmem.kvm import kvmclock
from guestmem.kvm.irqchip import USERSPACE_SOURCE, MsiRoute, routing
from guestmem.kvm.irqchip.chip import STATE_SIZE
from guestmem.kvm.irqchip.pit import STATE_SIZE as PIT_STATE_SIZE
from guestmem.kvm.vm_irqchip import any_irqchip, create_irqchip, create_pit, full_irqchip, pit_of, set_boot_cpu
from guestmem.serve import irqfd
from guestmem.serve.call import Call
from guestmem.trace import Refusal
from guestmem.uapi import kvm as uapi

_IRQ_LEVEL = struct.Struct("<II")  # irq or status, level
_CHIP_HEAD = struct.Struct("<II")
_ROUTING_HEAD = struct.Struct("<II")  # nr, flags
_MSI = struct.Struct("<5I12x")  # address_lo, address_hi, data, flags, devid
_MSI_VALID_DEVID = 1
_PIT_SPEAKER = 1
_COUNTERS_SIZE = 72
_CHIPS = 3
_CLOCK = struct.Struct("<QIIQQ16x")  # clock, flags, pad, realtime, host_tsc


# Making them


async def _create_irqchip(call: Call, argument: int) -> int:
    """Raises: as create_irqchip."""
    create_irqchip(call.kvm)
    return 0


async def _set_boot_cpu_id(call: Call, number: int) -> int:
    """Raises: as set_boot_cpu."""
    set_boot_cpu(call.kvm, number)
    return 0


# State


def _check_chip(chip: int) -> None:
    if chip >= _CHIPS:
        raise Refusal(errno.EINVAL, "ioctl.argument", chip=chip)


async def _get_irqchip(call: Call, argument: int) -> int:
    """struct kvm_irqchip: id, padding, 512 bytes of state."""
    chip, _ = _CHIP_HEAD.unpack(await call.client.memory.copy_from_user(argument, _CHIP_HEAD.size))
    irqchip = full_irqchip(call.kvm)
    _check_chip(chip)
    await call.client.memory.copy_to_user(argument + _CHIP_HEAD.size, irqchip.get_state(chip))
    return 0


async def _set_irqchip(call: Call, argument: int) -> int:
    data = await call.client.memory.copy_from_user(argument, _CHIP_HEAD.size + STATE_SIZE)
    chip, _ = _CHIP_HEAD.unpack_from(data)
    irqchip = full_irqchip(call.kvm)
    _check_chip(chip)
    irqchip.set_state(chip, data[_CHIP_HEAD.size :])
    return 0


async def _create_pit2(call: Call, argument: int) -> int:
    """Raises: as create_pit."""
    (flags,) = struct.unpack_from("<I", await call.client.memory.copy_from_user(argument, 64))
    create_pit(call.kvm, bool(flags & _PIT_SPEAKER))
    return 0


async def _create_pit(call: Call, argument: int) -> int:
    """The older call, with the speaker's port. Raises: as create_pit."""
    create_pit(call.kvm, has_speaker=True)
    return 0


async def _get_pit(call: Call, argument: int) -> int:
    """struct kvm_pit_state: the counters alone."""
    await call.client.memory.copy_to_user(argument, pit_of(call.kvm).pack()[:_COUNTERS_SIZE])
    return 0


async def _set_pit(call: Call, argument: int) -> int:
    data = await call.client.memory.copy_from_user(argument, _COUNTERS_SIZE)
    pit = pit_of(call.kvm)
    pit.unpack(data + pit.pack()[_COUNTERS_SIZE:])
    return 0


async def _get_pit2(call: Call, argument: int) -> int:
    await call.client.memory.copy_to_user(argument, pit_of(call.kvm).pack())
    return 0


async def _set_pit2(call: Call, argument: int) -> int:
    data = await call.client.memory.copy_from_user(argument, PIT_STATE_SIZE)
    pit_of(call.kvm).unpack(data)
    return 0


async def _reinject_control(call: Call, argument: int) -> int:
    """struct kvm_reinject_control: pit_reinject is its first byte."""
    data = await call.client.memory.copy_from_user(argument, 32)
    pit_of(call.kvm).set_reinject(bool(data[0]))
    return 0


# Interrupts


async def _irq_line(call: Call, argument: int) -> int:
    """KVM_IRQ_LINE. Raises: Refusal ENXIO `irqchip.none`."""
    gsi, level = _IRQ_LEVEL.unpack(await call.client.memory.copy_from_user(argument, _IRQ_LEVEL.size))
    any_irqchip(call.kvm).set_irq(gsi, USERSPACE_SOURCE, bool(level))
    return 0


async def _irq_line_status(call: Call, argument: int) -> int:
    """And how many interrupts came of it, in the place of the GSI."""
    gsi, level = _IRQ_LEVEL.unpack(await call.client.memory.copy_from_user(argument, _IRQ_LEVEL.size))
    status = any_irqchip(call.kvm).set_irq(gsi, USERSPACE_SOURCE, bool(level))
    await call.client.memory.copy_to_user(argument, _IRQ_LEVEL.pack(status & 0xFFFF_FFFF, level))
    return 0


async def _set_gsi_routing(call: Call, argument: int) -> int:
    """Raises: Refusal EINVAL `routing.no_irqchip`, `routing.table`; as parse_routes."""
    memory, kvm = call.client.memory, call.kvm
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
    kvm = call.kvm
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
    kvm = call.kvm
    now, realtime, host_tsc = kvm.clock.now(), time.time_ns(), time.monotonic_ns() * TSC_KHZ // 1_000_000
    await call.client.memory.copy_to_user(argument, _CLOCK.pack(now, kvmclock.CLOCK_FLAGS, 0, realtime, host_tsc))
    return 0


async def _set_clock(call: Call, argument: int) -> int:
    """With KVM_CLOCK_REALTIME the time since `realtime` is added. Source: kvm_vm_ioctl_set_clock."""
    clock, flags, _, realtime, _ = _CLOCK.unpack(await call.client.memory.copy_from_user(argument, _CLOCK.size))
    if flags & ~kvmclock.FLAG_REALTIME:
        raise Refusal(errno.EINVAL, "ioctl.argument", flags=flags)
    kvm = call.kvm
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
