"""ioctls of a VM: memory, vCPUs, capabilities, and what clients ask for before they start.

What is about interrupts and time is in `irqchip_ioctls`. Source: virt/kvm/kvm_main.c kvm_vm_ioctl, arch/x86/kvm/x86.c
kvm_arch_vm_ioctl.
"""

from __future__ import annotations

import errno
import functools
import struct
from collections.abc import Awaitable, Callable

from guestmem.kvm.dirty_log import clear_dirty_log, get_dirty_log
from guestmem.kvm.ioctl import VM_IOCTLS, check_vcpu_creation
from guestmem.kvm.vcpu import create_vcpu
from guestmem.serve import capabilities, io_devices, irqchip_ioctls, kvm_devices, msr_filter_ioctls, tsc_ioctls
from guestmem.serve.call import Call, CallFiles, KvmCaller
from guestmem.serve.enable_cap import enable_vm_cap
from guestmem.serve.files import VcpuFile, VmFile
from guestmem.trace import Refusal
from guestmem.uapi import kvm as uapi
from guestmem.uapi.structs import LinkGuestMemfd, UserspaceMemoryRegion2

_DIRTY_LOG = struct.Struct("<IIQ")
_CLEAR_DIRTY_LOG = struct.Struct("<IIQQ")
_MIN_MMU_PAGES = 64  # KVM_MIN_ALLOC_MMU_PAGES
_LAST_TSS = (1 << 32) - 3 * 4096


async def _check_extension(call: Call, number: int) -> int:
    kvm = call.kvm
    answer = capabilities.check_extension(kvm.level, kvm, number)
    call.server.report.capability(number, answer)
    return answer


async def _create_vcpu(call: Call, number: int) -> int:
    """Raises: Refusal EINVAL `vcpu.number`, `vcpu.too_many`; as check_vcpu_creation; EEXIST `vcpu.exists`."""
    kvm = call.kvm
    if number >= kvm.max_vcpu_ids:
        raise Refusal(errno.EINVAL, "vcpu.number", vcpu=number, limit=kvm.max_vcpu_ids)
    if kvm.created_vcpus >= uapi.KVM_MAX_VCPUS:
        raise Refusal(errno.EINVAL, "vcpu.too_many", vcpus=kvm.created_vcpus)
    check_vcpu_creation(kvm)
    file = VcpuFile(call.client, await create_vcpu(call.kvm, number))
    assert isinstance(call.file, VmFile)
    if call.file.ring.run is None:
        call.file.ring.run = file.run
    return call.give(call.server.add_token(file))


# Memory


async def _memory(request: int, call: Call, argument: int) -> int:
    """What `kvm` does as it is. A descriptor in the argument is looked up before, which takes the client."""
    memory, files = call.client.memory, CallFiles(call)
    if request == uapi.KVM_SET_USER_MEMORY_REGION2:
        data = await memory.copy_from_user(argument, UserspaceMemoryRegion2.SIZE)
        region = UserspaceMemoryRegion2.unpack(data)
        if region.flags & uapi.KVM_MEM_GUEST_MEMFD and region.memory_size:
            await files.look_up(region.guest_memfd)
    elif request == uapi.KVM_LINK_GUEST_MEMFD:
        data = await memory.copy_from_user(argument, LinkGuestMemfd.SIZE)
        await files.look_up_to_link(LinkGuestMemfd.unpack(data).fd & 0xFFFF_FFFF)
    return await VM_IOCTLS[request](KvmCaller(memory, files), call.kvm, argument)


async def _get_dirty_log(call: Call, argument: int) -> int:
    slot, _, bitmap = _DIRTY_LOG.unpack(await call.client.memory.copy_from_user(argument, _DIRTY_LOG.size))
    await call.client.memory.copy_to_user(bitmap, await get_dirty_log(call.kvm, slot))
    return 0


async def _clear_dirty_log(call: Call, argument: int) -> int:
    memory = call.client.memory
    slot, pages, first, bitmap = _CLEAR_DIRTY_LOG.unpack(await memory.copy_from_user(argument, _CLEAR_DIRTY_LOG.size))
    if first % 64 or pages > uapi.KVM_MEM_MAX_NR_PAGES:
        raise Refusal(errno.EINVAL, "dirty_log.range", first=first, pages=pages)
    await clear_dirty_log(call.kvm, slot, first, pages, await memory.copy_from_user(bitmap, -(-pages // 64) * 8))
    return 0


# What VMMs say once, before they start


async def _set_tss_addr(call: Call, address: int) -> int:
    """Three pages that Intel's hardware needs for real mode; this CPU does not. Source: kvm_vm_ioctl_set_tss_addr."""
    if address > _LAST_TSS:
        raise Refusal(errno.EINVAL, "ioctl.argument", address=address, last=_LAST_TSS)
    return 0


async def _set_identity_map_addr(call: Call, argument: int) -> int:
    """Likewise a page table. Raises: Refusal EINVAL `vm.has_vcpus`."""
    await call.client.memory.copy_from_user(argument, 8)
    if call.kvm.created_vcpus:
        raise Refusal(errno.EINVAL, "vm.has_vcpus", vcpus=call.kvm.created_vcpus)
    return 0


async def _set_nr_mmu_pages(call: Call, pages: int) -> int:
    """How much memory shadow tables may take, of which there are none."""
    if pages < _MIN_MMU_PAGES:
        raise Refusal(errno.EINVAL, "ioctl.argument", pages=pages, least=_MIN_MMU_PAGES)
    return 0


TABLE: dict[int, Callable[[Call, int], Awaitable[int]]] = {
    **{request: functools.partial(_memory, request) for request in VM_IOCTLS},
    **irqchip_ioctls.TABLE,
    **msr_filter_ioctls.TABLE,
    **tsc_ioctls.OF_A_VM,
    uapi.KVM_CHECK_EXTENSION: _check_extension,
    uapi.KVM_CREATE_VCPU: _create_vcpu,
    uapi.KVM_GET_DIRTY_LOG: _get_dirty_log,
    uapi.KVM_CLEAR_DIRTY_LOG: _clear_dirty_log,
    uapi.KVM_ENABLE_CAP: enable_vm_cap,
    uapi.KVM_IOEVENTFD: io_devices.ioeventfd,
    uapi.KVM_REGISTER_COALESCED_MMIO: io_devices.register_coalesced,
    uapi.KVM_UNREGISTER_COALESCED_MMIO: io_devices.unregister_coalesced,
    uapi.KVM_SET_NR_MMU_PAGES: _set_nr_mmu_pages,
    uapi.KVM_SET_TSS_ADDR: _set_tss_addr,
    uapi.KVM_SET_IDENTITY_MAP_ADDR: _set_identity_map_addr,
    uapi.KVM_CREATE_DEVICE: kvm_devices.create_device,
}
