"""ioctls of a VM: memory, vCPUs, capabilities, and what clients ask for before they start.

Interrupt controller, timer and clock are as far as a client needs them to start: made, saved and restored, but no
interrupt comes from them. Source: virt/kvm/kvm_main.c kvm_vm_ioctl, arch/x86/kvm/x86.c kvm_arch_vm_ioctl.
"""

from __future__ import annotations

import errno
import functools
import struct
import time

from guestmem.cpu.msrs import TSC_KHZ
from guestmem.kvm.dirty_log import clear_dirty_log, get_dirty_log
from guestmem.kvm.enc_context import copy_enc_context_from, move_enc_context_from
from guestmem.kvm.ioctl import VM_IOCTLS, check_vcpu_creation
from guestmem.kvm.vcpu import create_vcpu
from guestmem.kvm.vm import Kvm
from guestmem.serve import capabilities, io_devices
from guestmem.serve.call import Call, CallFiles, KvmCaller
from guestmem.serve.client_cpus import ClientCpu, ClientCpus
from guestmem.serve.files import VcpuFile, VmFile
from guestmem.trace import Refusal
from guestmem.uapi import kvm as uapi
from guestmem.uapi.kvm import VmType
from guestmem.uapi.structs import LinkGuestMemfd, UserspaceMemoryRegion2

_ENABLE_CAP = struct.Struct("<II4Q64x")
_CLOCK = struct.Struct("<QIIQQ16x")
_DIRTY_LOG = struct.Struct("<IIQ")
_CLEAR_DIRTY_LOG = struct.Struct("<IIQQ")
_MIN_MMU_PAGES = 20


def _kvm(call: Call) -> Kvm:
    assert isinstance(call.file, VmFile)
    return call.file.kvm


async def _check_extension(call: Call, number: int) -> int:
    kvm = _kvm(call)
    return capabilities.check_extension(kvm.level, kvm, number)


async def _create_vcpu(call: Call, number: int) -> int:
    """Raises: Refusal EINVAL `vcpu.number`; as check_vcpu_creation; EEXIST `vcpu.exists`."""
    if number >= capabilities.MAX_VCPUS:
        raise Refusal(errno.EINVAL, "vcpu.number", vcpu=number, limit=capabilities.MAX_VCPUS)
    kvm = _kvm(call)
    check_vcpu_creation(kvm)
    cpus = kvm.stage2.remote
    new_engine = functools.partial(ClientCpu, cpus) if isinstance(cpus, ClientCpus) else None
    file = VcpuFile(call.client, await create_vcpu(kvm, number, new_engine))
    assert isinstance(call.file, VmFile)
    if call.file.ring.run is None:
        call.file.ring.run = file.run
    return call.give(call.server.add_token(file))


# Memory


async def _memory(call: Call, argument: int) -> int:
    """What `kvm` does as it is. A descriptor in the argument is looked up before, which takes the client."""
    request, memory, files = call.request.a & 0xFFFF_FFFF, call.client.memory, CallFiles(call)
    if request == uapi.KVM_SET_USER_MEMORY_REGION2:
        data = await memory.copy_from_user(argument, UserspaceMemoryRegion2.SIZE)
        region = UserspaceMemoryRegion2.unpack(data)
        if region.flags & uapi.KVM_MEM_GUEST_MEMFD and region.memory_size:
            await files.look_up(region.guest_memfd)
    elif request == uapi.KVM_LINK_GUEST_MEMFD:
        data = await memory.copy_from_user(argument, LinkGuestMemfd.SIZE)
        await files.look_up_to_link(LinkGuestMemfd.unpack(data).fd & 0xFFFF_FFFF)
    return await VM_IOCTLS[request](KvmCaller(memory, files), _kvm(call), argument)


async def _get_dirty_log(call: Call, argument: int) -> int:
    slot, _, bitmap = _DIRTY_LOG.unpack(await call.client.memory.copy_from_user(argument, _DIRTY_LOG.size))
    await call.client.memory.copy_to_user(bitmap, await get_dirty_log(_kvm(call), slot))
    return 0


async def _clear_dirty_log(call: Call, argument: int) -> int:
    memory = call.client.memory
    slot, pages, first, bitmap = _CLEAR_DIRTY_LOG.unpack(await memory.copy_from_user(argument, _CLEAR_DIRTY_LOG.size))
    if first % 64 or pages > uapi.KVM_MEM_MAX_NR_PAGES:
        raise Refusal(errno.EINVAL, "dirty_log.range", first=first, pages=pages)
    await clear_dirty_log(_kvm(call), slot, first, pages, await memory.copy_from_user(bitmap, -(-pages // 64) * 8))
    return 0


# What is only kept


async def _accept(call: Call, argument: int) -> int:
    """Nothing that we do depends on it."""
    return 0


async def _accept_u64(call: Call, argument: int) -> int:
    await call.client.memory.copy_from_user(argument, 8)
    return 0


async def _set_nr_mmu_pages(call: Call, pages: int) -> int:
    if pages < _MIN_MMU_PAGES:
        raise Refusal(errno.EINVAL, "ioctl.argument", pages=pages, least=_MIN_MMU_PAGES)
    return 0


async def _create_irqchip(call: Call, argument: int) -> int:
    """Raises: Refusal EEXIST `irqchip.exists`; ENOTTY `irqchip.protected`; EINVAL `irqchip.late` after vCPUs."""
    kvm = _kvm(call)
    _check_no_irqchip(kvm)
    if kvm.vm_type in _PROTECTED_EOI:
        raise Refusal(errno.ENOTTY, "irqchip.protected", vm=kvm.number)
    _check_no_vcpus(kvm)
    kvm.irqchip = {}
    return 0


def _split_irqchip(kvm: Kvm) -> None:
    """The APICs are the kernel's, the other controllers the VMM's. Raises: Refusal EEXIST `irqchip.exists`; EINVAL
    `irqchip.late`. Source: kvm_vm_ioctl_enable_cap, KVM_CAP_SPLIT_IRQCHIP."""
    _check_no_irqchip(kvm)
    _check_no_vcpus(kvm)
    kvm.split_irqchip = True


def _check_no_irqchip(kvm: Kvm) -> None:
    if kvm.apic_in_kernel:
        raise Refusal(errno.EEXIST, "irqchip.exists", vm=kvm.number)


def _check_no_vcpus(kvm: Kvm) -> None:
    if kvm.vcpus:
        raise Refusal(errno.EINVAL, "irqchip.late", vcpus=len(kvm.vcpus))


_PROTECTED_EOI = (VmType.TDX,)


def _irqchip(call: Call) -> dict[int, bytes]:
    irqchip = _kvm(call).irqchip
    if irqchip is None:
        raise Refusal(errno.ENXIO, "irqchip.none", vm=_kvm(call).number)
    return irqchip


async def _get_irqchip(call: Call, argument: int) -> int:
    """struct kvm_irqchip: id, padding, 512 bytes of state, as last set."""
    chips = _irqchip(call)
    (chip,) = struct.unpack("<I", await call.client.memory.copy_from_user(argument, 4))
    if chip > 2:
        raise Refusal(errno.EINVAL, "ioctl.argument", chip=chip)
    await call.client.memory.copy_to_user(argument + 8, chips.get(chip, bytes(512)))
    return 0


async def _set_irqchip(call: Call, argument: int) -> int:
    chips = _irqchip(call)
    data = await call.client.memory.copy_from_user(argument, 520)
    (chip,) = struct.unpack_from("<I", data)
    if chip > 2:
        raise Refusal(errno.EINVAL, "ioctl.argument", chip=chip)
    chips[chip] = data[8:]
    return 0


async def _irq_line(call: Call, argument: int) -> int:
    """A line goes up or down. Nobody listens: the controllers interrupt no vCPU."""
    _irqchip(call)
    await call.client.memory.copy_from_user(argument, 8)
    return 0


async def _create_pit2(call: Call, argument: int) -> int:
    await call.client.memory.copy_from_user(argument, 64)
    chips = _irqchip(call)
    if _PIT in chips:
        raise Refusal(errno.EEXIST, "irqchip.exists", vm=_kvm(call).number)
    chips[_PIT] = bytes(112)
    return 0


_PIT = 3


async def _get_pit2(call: Call, argument: int) -> int:
    state = _irqchip(call).get(_PIT)
    if state is None:
        raise Refusal(errno.ENXIO, "irqchip.none", vm=_kvm(call).number)
    await call.client.memory.copy_to_user(argument, state)
    return 0


async def _set_pit2(call: Call, argument: int) -> int:
    chips = _irqchip(call)
    if _PIT not in chips:
        raise Refusal(errno.ENXIO, "irqchip.none", vm=_kvm(call).number)
    chips[_PIT] = await call.client.memory.copy_from_user(argument, 112)
    return 0


async def _get_clock(call: Call, argument: int) -> int:
    """kvmclock: nanoseconds since the VM's clock was zero."""
    now = time.monotonic_ns() + _kvm(call).clock_offset_ns
    await call.client.memory.copy_to_user(argument, _CLOCK.pack(now, 0, 0, 0, 0))
    return 0


async def _set_clock(call: Call, argument: int) -> int:
    clock, flags, *_ = _CLOCK.unpack(await call.client.memory.copy_from_user(argument, _CLOCK.size))
    if flags:
        raise Refusal(errno.EINVAL, "ioctl.argument", flags=flags)
    _kvm(call).clock_offset_ns = clock - time.monotonic_ns()
    return 0


async def _get_tsc_khz(call: Call, argument: int) -> int:
    return TSC_KHZ


async def _enable_cap(call: Call, argument: int) -> int:
    """Raises: Refusal EINVAL `enable_cap.argument`; as `enc_context`. Source: kvm_vm_ioctl_enable_cap."""
    cap, flags, value, *_ = _ENABLE_CAP.unpack(await call.client.memory.copy_from_user(argument, _ENABLE_CAP.size))
    if not flags and _kvm(call).level.link and cap in _CONTEXT_FROM:
        files = CallFiles(call)
        await files.look_up(value & 0xFFFF_FFFF)
        await _CONTEXT_FROM[cap](_kvm(call), files, value & 0xFFFF_FFFF)
        return 0
    valid = _ENABLED_BITS.get(cap)
    if flags or valid is None or value & ~valid:
        raise Refusal(errno.EINVAL, "enable_cap.argument", cap=cap, flags=flags, value=value)
    if cap == capabilities.EXIT_HYPERCALL:
        _kvm(call).enabled_hypercalls = value
    elif cap == capabilities.SPLIT_IRQCHIP:
        _split_irqchip(_kvm(call))
    return 0


_CONTEXT_FROM = {
    uapi.KVM_CAP_VM_COPY_ENC_CONTEXT_FROM: copy_enc_context_from,
    uapi.KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM: move_enc_context_from,
}
_ENABLED_BITS = {
    capabilities.SPLIT_IRQCHIP: 0xFFFF_FFFF,  # how many lines the VMM's controllers have
    capabilities.EXIT_HYPERCALL: capabilities.EXIT_HYPERCALL_VALID,
    capabilities.DISABLE_QUIRKS: capabilities.QUIRKS_VALID,
    capabilities.DISABLE_QUIRKS2: capabilities.QUIRKS_VALID,
}

TABLE = {
    **dict.fromkeys(VM_IOCTLS, _memory),
    uapi.KVM_CHECK_EXTENSION: _check_extension,
    uapi.KVM_CREATE_VCPU: _create_vcpu,
    uapi.KVM_GET_DIRTY_LOG: _get_dirty_log,
    uapi.KVM_CLEAR_DIRTY_LOG: _clear_dirty_log,
    uapi.KVM_ENABLE_CAP: _enable_cap,
    uapi.KVM_IOEVENTFD: io_devices.ioeventfd,
    uapi.KVM_REGISTER_COALESCED_MMIO: io_devices.register_coalesced,
    uapi.KVM_UNREGISTER_COALESCED_MMIO: io_devices.unregister_coalesced,
    uapi.KVM_SET_NR_MMU_PAGES: _set_nr_mmu_pages,
    uapi.KVM_SET_TSS_ADDR: _accept,
    uapi.KVM_SET_IDENTITY_MAP_ADDR: _accept_u64,
    uapi.KVM_SET_BOOT_CPU_ID: _accept,
    uapi.KVM_REINJECT_CONTROL: _accept,
    uapi.KVM_SET_TSC_KHZ: _accept,
    uapi.KVM_GET_TSC_KHZ: _get_tsc_khz,
    uapi.KVM_CREATE_IRQCHIP: _create_irqchip,
    uapi.KVM_GET_IRQCHIP: _get_irqchip,
    uapi.KVM_SET_IRQCHIP: _set_irqchip,
    uapi.KVM_IRQ_LINE: _irq_line,
    uapi.KVM_IRQ_LINE_STATUS: _irq_line,
    uapi.KVM_SET_GSI_ROUTING: _accept_u64,
    uapi.KVM_CREATE_PIT2: _create_pit2,
    uapi.KVM_GET_PIT2: _get_pit2,
    uapi.KVM_SET_PIT2: _set_pit2,
    uapi.KVM_GET_CLOCK: _get_clock,
    uapi.KVM_SET_CLOCK: _set_clock,
}
