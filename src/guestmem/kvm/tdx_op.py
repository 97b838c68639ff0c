"""KVM_MEMORY_ENCRYPT_OP on a TDX VM and its vCPUs: a TD is initialised, filled and finalized.

What TDX_INIT_MEM_REGION adds stands at the source address, or with a source of zero in the page itself. What the module
said comes back in the command's `hw_error`.

Source: arch/x86/kvm/vmx/tdx.c tdx_vm_ioctl, tdx_vcpu_ioctl, tdx_vcpu_init_mem_region; in-place v8 for a source of zero.
"""

from __future__ import annotations

import errno
import struct

from guestmem.arch import FirmwareError
from guestmem.arch.tdx import NOT_MEASURED
from guestmem.kvm.addresses import Gfn
from guestmem.kvm.launch import launch_finish, launch_start, launch_update
from guestmem.kvm.vm import HostAddressSpace, Kvm
from guestmem.memory import PAGE_SHIFT, PAGE_SIZE
from guestmem.trace import Refusal
from guestmem.uapi.kvm import (
    KVM_TDX_FINALIZE_VM,
    KVM_TDX_INIT_MEM_REGION,
    KVM_TDX_INIT_VCPU,
    KVM_TDX_INIT_VM,
    KVM_TDX_MEASURE_MEMORY_REGION,
)

_OF_VMS = (KVM_TDX_INIT_VM, KVM_TDX_FINALIZE_VM)
_OF_VCPUS = (KVM_TDX_INIT_VCPU, KVM_TDX_INIT_MEM_REGION)
_COMMAND = struct.Struct("<IIQQ")  # struct kvm_tdx_cmd: id, flags, data, hw_error
_HW_ERROR_OFFSET = 16
_ATTRIBUTES = struct.Struct("<Q")  # how struct kvm_tdx_init_vm begins
_REGION = struct.Struct("<QQQ")  # struct kvm_tdx_init_mem_region: source_addr, gpa, nr_pages


async def tdx_op(kvm: Kvm, mm: HostAddressSpace, argument: int, *, on_vcpu: bool) -> int:
    """Do the command at a user address.

    Raises: Refusal EINVAL `tdx_op.command`, `tdx_op.order`, `tdx_op.argument`; EFAULT; as `launch`.
    """
    number, flags, data, _ = _COMMAND.unpack(await mm.copy_from_user(argument, _COMMAND.size))
    if number not in (_OF_VCPUS if on_vcpu else _OF_VMS):
        raise Refusal(errno.EINVAL, "tdx_op.command", command=number, on="vCPU" if on_vcpu else "VM")
    if (number == KVM_TDX_INIT_VM) is kvm.encryption_initialised:
        raise Refusal(errno.EINVAL, "tdx_op.order", command=number, initialised=kvm.encryption_initialised)
    if flags & ~(KVM_TDX_MEASURE_MEMORY_REGION if number == KVM_TDX_INIT_MEM_REGION else 0):
        raise Refusal(errno.EINVAL, "tdx_op.argument", command=number, flags=flags)
    try:
        if number == KVM_TDX_INIT_VM:
            await _init_vm(kvm, mm, data)
        elif number == KVM_TDX_INIT_MEM_REGION:
            await _init_mem_region(kvm, mm, data, 0 if flags else NOT_MEASURED)
        elif number == KVM_TDX_FINALIZE_VM:
            await launch_finish(kvm)
    except Refusal as refusal:
        if isinstance(refusal.__cause__, FirmwareError):
            status = getattr(refusal.__cause__, "status", 0)
            await mm.copy_to_user(argument + _HW_ERROR_OFFSET, struct.pack("<Q", status))
        raise
    return 0


async def _init_vm(kvm: Kvm, mm: HostAddressSpace, data: int) -> None:
    """No attributes are offered; CPUID, XFAM and owners are not modelled. Source: tdx_td_init."""
    (attributes,) = _ATTRIBUTES.unpack(await mm.copy_from_user(data, _ATTRIBUTES.size))
    if attributes:
        raise Refusal(errno.EINVAL, "tdx_op.argument", command=KVM_TDX_INIT_VM, attributes=attributes)
    await launch_start(kvm, attributes)
    kvm.encryption_initialised = True


async def _init_mem_region(kvm: Kvm, mm: HostAddressSpace, data: int, kind: int) -> None:
    """What was done is taken off the region, so that the client may call again for the rest."""
    source, gpa, pages = _REGION.unpack(await mm.copy_from_user(data, _REGION.size))
    if not pages or (source | gpa) % PAGE_SIZE or gpa + (pages << PAGE_SHIFT) >= 1 << 64:
        raise Refusal(errno.EINVAL, "tdx_op.argument", command=KVM_TDX_INIT_MEM_REGION, gpa=gpa, pages=pages)
    done = await launch_update(kvm, Gfn(gpa >> PAGE_SHIFT), source or None, pages, kind)
    size = done << PAGE_SHIFT
    await mm.copy_to_user(data, _REGION.pack(source + size if source else 0, gpa + size, pages - done))
