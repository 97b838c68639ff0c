"""The ioctls as a client makes them: a number and a user address. Copies in, calls, copies out.

One table for each kind of file. The calls themselves are elsewhere and take checked-size structures; what stands here
is what every ioctl has in common: who may call (EIO from another address space), what is unknown (ENOTTY or EINVAL by
kind of file), and that an unreadable argument is EFAULT before anything else.

Source: virt/kvm/kvm_main.c kvm_vm_ioctl, kvm_vcpu_ioctl; golden_6_18.md rows K1 to K13, N24 to N33, G44.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol, TypeAlias

from guestmem.kvm.context import KvmGmemContext
from guestmem.kvm.gmem import (
    create_guest_memfd,
    gmem_convert,
    require_hugetlb,
    require_in_place,
    set_memory_attributes2,
)
from guestmem.kvm.link import link_guest_memfd
from guestmem.kvm.prefault import pre_fault_memory
from guestmem.kvm.protected.snp_op import snp_op
from guestmem.kvm.protected.tdx_op import check_vcpu, tdx_op, tdx_vcpu_op
from guestmem.kvm.set_region import set_user_memory_region2
from guestmem.kvm.vcpu import Vcpu
from guestmem.kvm.vm import HostAddressSpace, Kvm
from guestmem.kvm.vm_attributes import set_memory_attributes
from guestmem.memory import Access, File
from guestmem.trace import Refusal
from guestmem.uapi import kvm as uapi
from guestmem.uapi.kvm import VmType
from guestmem.uapi.structs import (
    CreateGuestMemfd,
    GmemConvert,
    LinkGuestMemfd,
    MemoryAttributes,
    MemoryAttributes2,
    PreFaultMemory,
    UserspaceMemoryRegion,
    UserspaceMemoryRegion2,
)


class OpenFile(Protocol):
    """What a descriptor refers to."""

    def get(self) -> None: ...

    async def put(self) -> None: ...


class Descriptors(Protocol):
    """The caller's table of open files."""

    def get(self, fd: int) -> OpenFile: ...

    def reserve(self) -> int: ...

    def unreserve(self, fd: int) -> None: ...

    def install(self, fd: int, file: File) -> None: ...


class Caller(Protocol):
    """The process that makes the call."""

    @property
    def mm(self) -> HostAddressSpace: ...

    @property
    def fds(self) -> Descriptors: ...


async def ioctl(caller: Caller, fd: int, request: int, argument: int) -> int:
    """ioctl(2) on a VM, vCPU or guest_memfd descriptor; its return value. `argument` is a user address.

    Raises: Refusal EBADF `fd.not_open`; EIO `ioctl.other_mm`; ENOTTY or EINVAL `ioctl.unknown`; EFAULT `user.copy`;
    what the call refuses.
    """
    file = caller.fds.get(fd)
    file.get()  # another thread may close the descriptor meanwhile
    try:
        return await _dispatch(caller, file, request, argument)
    finally:
        await file.put()


async def _dispatch(caller: Caller, file: OpenFile, request: int, argument: int) -> int:
    if isinstance(file, File) and isinstance(file.private_data, KvmGmemContext):
        return await gmem_ioctl(caller.mm, file, request, argument)
    if isinstance(file, Kvm):
        _check_caller(caller, file)
        handler = VM_IOCTLS.get(built_request(file, request, "VM"))
        if handler is None:
            raise Refusal(errno.ENOTTY, "ioctl.unknown", request=request, on="VM")
        return await handler(caller, file, argument)
    if isinstance(file, Vcpu):
        _check_caller(caller, file.kvm)
        request = built_request(file.kvm, request, "vCPU")
        if request == uapi.KVM_MEMORY_ENCRYPT_OP:
            return await encrypt_vcpu(caller, file, argument)
        if request != uapi.KVM_PRE_FAULT_MEMORY:
            raise Refusal(errno.EINVAL, "ioctl.unknown", request=request, on="vCPU")
        return await pre_fault(caller, file, argument)
    raise Refusal(errno.ENOTTY, "ioctl.unknown", request=request, on="other file")


UNKNOWN = {"VM": errno.ENOTTY, "vCPU": errno.EINVAL}


def built_request(kvm: Kvm, request: int, on: str) -> int:
    """An ioctl's number in our tables, for the one that the kernel of this level has it under.

    Raises: Refusal `ioctl.not_built`, with the errno of an unknown ioctl on this kind of file (`on`: VM or vCPU).
    """
    ours = kvm.level.request(request)
    if ours is None:
        raise Refusal(UNKNOWN[on], "ioctl.not_built", request=request, on=on, level=kvm.level.name)
    return ours


def _check_caller(caller: Caller, kvm: Kvm) -> None:
    kvm.check_alive()
    if caller.mm is not kvm.mm:
        raise Refusal(errno.EIO, "ioctl.other_mm", vm=kvm.number)


async def _create_guest_memfd(caller: Caller, kvm: Kvm, argument: int) -> int:
    data = await caller.mm.copy_from_user(argument, CreateGuestMemfd.SIZE)
    return await create_guest_memfd(kvm, caller.fds, CreateGuestMemfd.unpack(data))


async def _link_guest_memfd(caller: Caller, kvm: Kvm, argument: int) -> int:
    data = await caller.mm.copy_from_user(argument, LinkGuestMemfd.SIZE)
    return await link_guest_memfd(kvm, caller.fds, LinkGuestMemfd.unpack(data))


async def _set_region2(caller: Caller, kvm: Kvm, argument: int) -> int:
    data = await caller.mm.copy_from_user(argument, UserspaceMemoryRegion2.SIZE)
    await set_user_memory_region2(kvm, caller.fds, UserspaceMemoryRegion2.unpack(data))
    return 0


async def _set_region(caller: Caller, kvm: Kvm, argument: int) -> int:
    """The older call knows no guest_memfd flag; otherwise it is the newer one with zeros."""
    data = await caller.mm.copy_from_user(argument, UserspaceMemoryRegion.SIZE)
    region = UserspaceMemoryRegion.unpack(data).to_region2()
    if region.flags & uapi.KVM_MEM_GUEST_MEMFD:
        raise Refusal(errno.EINVAL, "region.v1_gmem", slot=region.slot, flags=region.flags)
    await set_user_memory_region2(kvm, caller.fds, region)
    return 0


async def _set_attributes(caller: Caller, kvm: Kvm, argument: int) -> int:
    data = await caller.mm.copy_from_user(argument, MemoryAttributes.SIZE)
    await set_memory_attributes(kvm, MemoryAttributes.unpack(data))
    return 0


async def gmem_ioctl(mm: HostAddressSpace, file: File, request: int, argument: int) -> int:
    """ioctl(2) on a guest_memfd by a process with memory `mm`.

    Raises: Refusal ENOTTY `ioctl.unknown`; as set_memory_attributes2 and gmem_convert.
    """
    context = file.private_data
    assert isinstance(context, KvmGmemContext)
    request = context.kvm.level.request(request) or request  # what is not built is refused below, by a rule of its own
    if request == uapi.KVM_SET_MEMORY_ATTRIBUTES2:
        require_in_place(file)
        attributes = MemoryAttributes2.unpack(await mm.copy_from_user(argument, MemoryAttributes2.SIZE))
        where = argument + MemoryAttributes2.ERROR_OFFSET_AT
        await _with_error_offset(mm, where, set_memory_attributes2(file, attributes))
    elif request in _GMEM_CONVERT:
        require_hugetlb(file)
        range_ = GmemConvert.unpack(await mm.copy_from_user(argument, GmemConvert.SIZE))
        where = argument + GmemConvert.ERROR_OFFSET_AT
        await _with_error_offset(mm, where, gmem_convert(file, range_, _GMEM_CONVERT[request]))
    else:
        raise Refusal(errno.ENOTTY, "ioctl.unknown", request=request, on="guest_memfd")
    return 0


async def _with_error_offset(mm: HostAddressSpace, where: int, call: Coroutine[Any, None, None]) -> None:
    """Make a call; where it stopped, if a refusal says so, goes to the caller's address `where`."""
    try:
        await call
    except Refusal as refusal:
        error_offset = refusal.facts.get("error_offset")
        if isinstance(error_offset, int):
            await mm.copy_to_user(where, struct.pack("<Q", error_offset))
        raise


async def pre_fault(caller: Caller, vcpu: Vcpu, argument: int) -> int:
    """KVM_PRE_FAULT_MEMORY on a vCPU. What is left of the range goes back to the caller, whatever became of it."""
    data = await caller.mm.copy_from_user(argument, PreFaultMemory.SIZE)
    async with vcpu.mutex:
        left = await pre_fault_memory(vcpu.kvm, PreFaultMemory.unpack(data))
    await caller.mm.copy_to_user(argument, struct.pack("<QQ", left.gpa, left.size))
    return 0


_GMEM_CONVERT = {uapi.KVM_GMEM_CONVERT_SHARED: Access.SHARED, uapi.KVM_GMEM_CONVERT_PRIVATE: Access.PRIVATE}

VmIoctl: TypeAlias = Callable[[Caller, Kvm, int], Awaitable[int]]


async def _memory_encrypt_op(caller: Caller, kvm: Kvm, argument: int) -> int:
    op = _ENCRYPT_OPS.get(kvm.vm_type)
    if op is None:
        raise Refusal(errno.ENOTTY, "ioctl.vm_type", on="VM", type=kvm.vm_type.name)
    return await op(kvm, caller.mm, argument)


async def encrypt_vcpu(caller: Caller, vcpu: Vcpu, argument: int) -> int:
    """KVM_MEMORY_ENCRYPT_OP on a vCPU: only TDX has that. Source: kvm_arch_vcpu_ioctl, vcpu_mem_enc_ioctl."""
    op = _VCPU_ENCRYPT_OPS.get(vcpu.kvm.vm_type)
    if op is None:
        raise Refusal(errno.ENOTTY, "ioctl.vm_type", on="vCPU", type=vcpu.kvm.vm_type.name)
    return await op(vcpu, caller.mm, argument)


def check_vcpu_creation(kvm: Kvm) -> None:
    """What a type of VM has against a vCPU now, before one is made. Source: kvm_arch_vcpu_precreate."""
    check = _VCPU_CHECKS.get(kvm.vm_type)
    if check is not None:
        check(kvm)


_EncryptOp: TypeAlias = Callable[[Kvm, HostAddressSpace, int], Awaitable[int]]
_VcpuEncryptOp: TypeAlias = Callable[[Vcpu, HostAddressSpace, int], Awaitable[int]]
_ENCRYPT_OPS: dict[VmType, _EncryptOp] = {VmType.SNP: snp_op, VmType.TDX: tdx_op}
_VCPU_ENCRYPT_OPS: dict[VmType, _VcpuEncryptOp] = {VmType.TDX: tdx_vcpu_op}
_VCPU_CHECKS: dict[VmType, Callable[[Kvm], None]] = {VmType.TDX: check_vcpu}

VM_IOCTLS: dict[int, VmIoctl] = {
    uapi.KVM_SET_USER_MEMORY_REGION: _set_region,
    uapi.KVM_SET_USER_MEMORY_REGION2: _set_region2,
    uapi.KVM_SET_MEMORY_ATTRIBUTES: _set_attributes,
    uapi.KVM_CREATE_GUEST_MEMFD: _create_guest_memfd,
    uapi.KVM_LINK_GUEST_MEMFD: _link_guest_memfd,
    uapi.KVM_MEMORY_ENCRYPT_OP: _memory_encrypt_op,
}
