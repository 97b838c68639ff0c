"""KVM_X86_SET_MSR_FILTER and KVM_CAP_X86_USER_SPACE_MSR. Source: arch/x86/kvm/x86.c kvm_vm_ioctl_set_msr_filter."""

from __future__ import annotations

import errno
import struct

from guestmem.kvm import msr_access
from guestmem.kvm.msr_filter import MAX_BITMAP, MAX_RANGES, READ, WRITE, MsrFilter, MsrRange
from guestmem.kvm.vm import Kvm
from guestmem.serve.call import Call
from guestmem.trace import Refusal
from guestmem.uapi import kvm as uapi

_FLAGS = struct.Struct("<I4x")
_RANGE = struct.Struct("<III4xQ")  # flags, nmsrs, base, bitmap
_SIZE = _FLAGS.size + MAX_RANGES * _RANGE.size
_DEFAULT_DENY = 1


async def set_msr_filter(call: Call, argument: int) -> int:
    """Raises: Refusal EINVAL `msr_filter.flags`, `msr_filter.denies_all`, `msr_filter.range`; EFAULT."""
    data = await call.client.memory.copy_from_user(argument, _SIZE)
    (flags,) = _FLAGS.unpack_from(data)
    entries = [entry for entry in _RANGE.iter_unpack(data[_FLAGS.size :]) if entry[1]]
    if flags & ~_DEFAULT_DENY:
        raise Refusal(errno.EINVAL, "msr_filter.flags", flags=flags)
    if flags & _DEFAULT_DENY and not entries:
        raise Refusal(errno.EINVAL, "msr_filter.denies_all")
    ranges = [await _range(call, *entry) for entry in entries]
    kvm = call.kvm
    async with kvm.lock:
        kvm.msr_filter = MsrFilter(tuple(ranges), not flags & _DEFAULT_DENY)
        _update(kvm)
    return 0


async def _range(call: Call, flags: int, count: int, first: int, bitmap: int) -> MsrRange:
    size = -(-count // 64) * 8
    if not flags or flags & ~(READ | WRITE) or size > MAX_BITMAP:
        raise Refusal(errno.EINVAL, "msr_filter.range", flags=flags, count=count, most=MAX_BITMAP * 8)
    return MsrRange(flags, first, count, await call.client.memory.copy_from_user(bitmap, size))


def user_space_msrs(kvm: Kvm, reasons: int) -> None:
    """KVM_CAP_X86_USER_SPACE_MSR: which reasons are exits from now on."""
    kvm.user_space_msrs = reasons
    _update(kvm)


def _update(kvm: Kvm) -> None:
    """The engines of the vCPUs that there are. Source: KVM_REQ_MSR_FILTER_CHANGED."""
    for vcpu in kvm.vcpus.values():
        msr_access.update_stops(vcpu)
    kvm.kick_vcpus()


TABLE = {uapi.KVM_X86_SET_MSR_FILTER: set_msr_filter}
