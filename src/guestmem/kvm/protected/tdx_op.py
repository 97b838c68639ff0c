"""KVM_MEMORY_ENCRYPT_OP on a TDX VM and its vCPUs: a TD is initialised, filled and finalized.

    VM: KVM_TDX_CAPABILITIES, KVM_TDX_INIT_VM -> KVM_CREATE_VCPU -> vCPU: KVM_TDX_GET_CPUID, KVM_TDX_INIT_VCPU,
    KVM_TDX_INIT_MEM_REGION -> VM: KVM_TDX_FINALIZE_VM

What TDX_INIT_MEM_REGION adds stands at the source address, or with a source of zero in the page itself. What the module
said of INIT_VM and FINALIZE_VM comes back in the command's `hw_error`; calls on vCPUs have no such answer.

Source: arch/x86/kvm/vmx/tdx.c tdx_vm_ioctl, tdx_vcpu_ioctl, tdx_vcpu_create, tdx_td_init, setup_tdparams,
tdx_vcpu_init, tdx_vcpu_init_mem_region, tdx_td_finalize; in-place v8 for a source of zero. Left out: a vCPU needs
x2APIC in its CPUID, which no engine has.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Awaitable, Callable

from guestmem.arch.tdx import NOT_MEASURED, TdParams, TdxGuest, parameters
from guestmem.arch.tdx.status import Status, TdxError
from guestmem.kvm.addresses import Gfn
from guestmem.kvm.protected import tdx_cpuid
from guestmem.kvm.protected.launch import launch_finish, launch_start, launch_update
from guestmem.kvm.vcpu import Vcpu
from guestmem.kvm.vm import HostAddressSpace, Kvm
from guestmem.memory import PAGE_SHIFT, PAGE_SIZE
from guestmem.trace import Refusal
from guestmem.uapi import tdx
from guestmem.uapi.kvm import (
    KVM_TDX_FINALIZE_VM,
    KVM_TDX_INIT_MEM_REGION,
    KVM_TDX_INIT_VCPU,
    KVM_TDX_INIT_VM,
    KVM_TDX_MEASURE_MEMORY_REGION,
)

SUPPORTED_ATTRIBUTES = parameters.SEPT_VE_DISABLE & parameters.ATTRIBUTES_FIXED0
"""KVM_SUPPORTED_TD_ATTRS, as far as the module has them: a TD that can be debugged is none that KVM makes."""

SUPPORTED_XFAM = parameters.XFAM_FIXED0


class _Call:
    """A struct kvm_tdx_cmd, read."""

    def __init__(self, kvm: Kvm, mm: HostAddressSpace, number: int, flags: int, data: int) -> None:
        self.kvm = kvm
        self.mm = mm
        self.number = number
        self.flags = flags
        self.data = data

    @property
    def guest(self) -> TdxGuest:
        guest = self.kvm.machine.architecture
        assert isinstance(guest, TdxGuest)
        return guest

    def check_flags(self, allowed: int = 0) -> None:
        if self.flags & ~allowed:
            raise Refusal(errno.EINVAL, "tdx_op.argument", command=self.number, flags=self.flags)


async def tdx_op(kvm: Kvm, mm: HostAddressSpace, argument: int) -> int:
    """Do the command at a user address, on a VM.

    Raises: Refusal EFAULT; EINVAL `tdx_op.hw_error`, `tdx_op.command`, `tdx_op.order`, `tdx_op.argument`,
    `tdx_op.attributes`, `tdx_op.xfam`, `tdx_op.cpuid`; EBUSY `tdx_op.vcpus`; E2BIG `list.too_small`, `list.too_long`;
    as `launch`.
    """
    call = await _read(kvm, mm, argument)
    command = _OF_VMS.get(call.number)
    if command is None:
        raise Refusal(errno.EINVAL, "tdx_op.command", command=call.number, on="VM")
    try:
        await command(call)
    except Refusal as refusal:
        await mm.copy_to_user(argument + tdx.HW_ERROR_OFFSET, struct.pack("<Q", _hw_error(refusal)))
        raise
    return 0


async def tdx_vcpu_op(vcpu: Vcpu, mm: HostAddressSpace, argument: int) -> int:
    """Do the command at a user address, on a vCPU. Raises: as tdx_op."""
    kvm = vcpu.kvm
    if not kvm.encryption_initialised or kvm.machine.architecture.launched:
        raise Refusal(errno.EINVAL, "tdx_op.order", initialised=kvm.encryption_initialised)
    call = await _read(kvm, mm, argument)
    command = _OF_VCPUS.get(call.number)
    if command is None:
        raise Refusal(errno.EINVAL, "tdx_op.command", command=call.number, on="vCPU")
    await command(call, vcpu)
    return 0


def check_vcpu(kvm: Kvm) -> None:
    """Whether a TD may get a vCPU now. Raises: Refusal EIO `vcpu.td_state`; EINVAL `vcpu.no_apic`."""
    if not kvm.encryption_initialised or kvm.machine.architecture.launched:
        raise Refusal(errno.EIO, "vcpu.td_state", initialised=kvm.encryption_initialised)
    if not kvm.apic_in_kernel:
        raise Refusal(errno.EINVAL, "vcpu.no_apic", vm=kvm.number)


async def _read(kvm: Kvm, mm: HostAddressSpace, argument: int) -> _Call:
    number, flags, data, hw_error = tdx.COMMAND.unpack(await mm.copy_from_user(argument, tdx.COMMAND.size))
    if hw_error:
        raise Refusal(errno.EINVAL, "tdx_op.hw_error", command=number, hw_error=hw_error)
    return _Call(kvm, mm, number, flags, data)


def _hw_error(refusal: Refusal) -> int:
    """Only what a VMM's own arguments caused, and how the end of the launch went."""
    error = refusal.__cause__
    if not isinstance(error, TdxError):
        return 0
    of_arguments = error.call == "TDH.MNG.INIT" and error.status >> 32 == Status.OPERAND_INVALID
    return error.status if of_arguments or error.call == "TDH.MR.FINALIZE" else 0


# On the VM


async def _capabilities(call: _Call) -> None:
    """No exit for a TD's own calls (TDVMCALL) is offered."""
    call.check_flags()
    entries = tdx_cpuid.configurable()
    list_at = call.data + tdx.CAPABILITIES.size
    room, padding = tdx.CPUID2.unpack(await call.mm.copy_from_user(list_at, tdx.CPUID2.size))
    tdx_cpuid.check_room(room, entries)
    fixed = tdx.CAPABILITIES.pack(SUPPORTED_ATTRIBUTES, SUPPORTED_XFAM, *(0,) * 254)
    await call.mm.copy_to_user(call.data, fixed + tdx.CPUID2.pack(len(entries), padding) + b"".join(entries))


async def _init_vm(call: _Call) -> None:
    kvm = call.kvm
    if kvm.encryption_initialised:
        raise Refusal(errno.EINVAL, "tdx_op.order", command=call.number, initialised=True)
    call.check_flags()
    attributes, xfam, config_id, owner, owner_config, reserved = tdx.INIT_VM.unpack(
        await call.mm.copy_from_user(call.data, tdx.INIT_VM.size)
    )
    if any(reserved):
        raise Refusal(errno.EINVAL, "tdx_op.argument", command=call.number, reserved=True)
    if kvm.created_vcpus:
        raise Refusal(errno.EBUSY, "tdx_op.vcpus", vcpus=kvm.created_vcpus)
    if attributes & ~SUPPORTED_ATTRIBUTES:
        raise Refusal(errno.EINVAL, "tdx_op.attributes", attributes=attributes, supported=SUPPORTED_ATTRIBUTES)
    if xfam & ~SUPPORTED_XFAM:
        raise Refusal(errno.EINVAL, "tdx_op.xfam", xfam=xfam, supported=SUPPORTED_XFAM)
    cpuid = await tdx_cpuid.read_choice(call.mm, call.data + tdx.INIT_VM.size)
    xfam |= parameters.XFAM_FIXED1
    await launch_start(kvm, TdParams(attributes, xfam, cpuid, config_id, owner, owner_config))
    kvm.encryption_initialised = True


async def _finalize_vm(call: _Call) -> None:
    if not call.kvm.encryption_initialised or call.kvm.machine.architecture.launched:
        raise Refusal(errno.EINVAL, "tdx_op.order", command=call.number, initialised=call.kvm.encryption_initialised)
    await launch_finish(call.kvm, True)


# On a vCPU


async def _init_vcpu(call: _Call, vcpu: Vcpu) -> None:
    """What the guest finds in RCX, a word for its firmware, is not modelled."""
    call.check_flags()
    if vcpu.number in call.guest.vcpus.tdvprs:
        raise Refusal(errno.EINVAL, "tdx_op.order", command=call.number, vcpu=vcpu.number)
    async with call.kvm.lock:
        try:
            call.guest.vcpus.add(call.guest.tdr, vcpu.number)
        except TdxError as error:
            raise Refusal(errno.EIO, "tdx_op.init_vcpu", call=error.call, code=error.code) from error


async def _init_mem_region(call: _Call, vcpu: Vcpu) -> None:
    """What was done is taken off the region, so that the client may call again for the rest."""
    if vcpu.number not in call.guest.vcpus.tdvprs:
        raise Refusal(errno.EINVAL, "tdx_op.order", command=call.number, vcpu=vcpu.number)
    call.check_flags(KVM_TDX_MEASURE_MEMORY_REGION)
    source, gpa, pages = tdx.MEM_REGION.unpack(await call.mm.copy_from_user(call.data, tdx.MEM_REGION.size))
    end = gpa + (pages << PAGE_SHIFT)
    if not pages or (source | gpa) % PAGE_SIZE or end > 1 << tdx_cpuid.GPA_BITS - 1:
        raise Refusal(errno.EINVAL, "tdx_op.argument", command=call.number, gpa=gpa, pages=pages, source=source)
    kind = 0 if call.flags else NOT_MEASURED
    done = await launch_update(call.kvm, Gfn(gpa >> PAGE_SHIFT), source or None, pages, kind)
    size = done << PAGE_SHIFT
    await call.mm.copy_to_user(call.data, tdx.MEM_REGION.pack(source + size if source else 0, gpa + size, pages - done))


async def _get_cpuid(call: _Call, vcpu: Vcpu) -> None:
    await tdx_cpuid.write(call.mm, call.data, tdx_cpuid.of_td(call.guest.td.params))


_OF_VMS: dict[int, Callable[[_Call], Awaitable[None]]] = {
    tdx.KVM_TDX_CAPABILITIES: _capabilities,
    KVM_TDX_INIT_VM: _init_vm,
    KVM_TDX_FINALIZE_VM: _finalize_vm,
}
_OF_VCPUS: dict[int, Callable[[_Call, Vcpu], Awaitable[None]]] = {
    KVM_TDX_INIT_VCPU: _init_vcpu,
    KVM_TDX_INIT_MEM_REGION: _init_mem_region,
    tdx.KVM_TDX_GET_CPUID: _get_cpuid,
}
