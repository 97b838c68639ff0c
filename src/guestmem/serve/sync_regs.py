"""KVM_CAP_SYNC_REGS: registers in struct kvm_run, so that a VMM needs no call for them around KVM_RUN.

`kvm_dirty_regs` is taken at the entry, `kvm_valid_regs` filled in at the exit, a bit for each of regs, sregs, events.
Source: arch/x86/kvm/x86.c sync_regs, store_regs, kvm_arch_vcpu_ioctl_run; Documentation/virt/kvm/api.rst 6.4.
"""

from __future__ import annotations

import errno
import struct

from guestmem.kvm.vcpu import Vcpu
from guestmem.serve import vcpu_state
from guestmem.serve.kvm_run import KvmRun
from guestmem.trace import Refusal

VALID = 0b111
_MASKS = struct.Struct("<QQ")  # kvm_valid_regs, kvm_dirty_regs
_MASKS_AT, _DIRTY_AT = 288, 296
_DIRTY = struct.Struct("<Q")
_AREAS = (
    (1, 304, 144, vcpu_state.get_regs, vcpu_state.set_regs),
    (2, 448, 312, vcpu_state.get_sregs, vcpu_state.set_sregs),
    (4, 760, 64, vcpu_state.get_events, vcpu_state.set_events),
)
"""Bit, place in struct kvm_run, size, and the pair of GET and SET that the area stands for."""


def are_asked_for(run: KvmRun) -> bool:
    """Whether a run has to look at them at all."""
    return _MASKS.unpack_from(run.memory, _MASKS_AT) != (0, 0)


def take(run: KvmRun, vcpu: Vcpu) -> None:
    """At the entry. Raises: Refusal EINVAL `run.sync_regs`, for a bit that there is not; as the SET calls."""
    valid, dirty = _MASKS.unpack_from(run.memory, _MASKS_AT)
    if (valid | dirty) & ~VALID:
        raise Refusal(errno.EINVAL, "run.sync_regs", valid=valid, dirty=dirty)
    for bit, at, size, _, set_ in _AREAS:
        if dirty & bit:
            set_(vcpu, bytes(run.memory[at : at + size]))
    _DIRTY.pack_into(run.memory, _DIRTY_AT, 0)


def fill(run: KvmRun, vcpu: Vcpu) -> None:
    """At the exit."""
    valid, _ = _MASKS.unpack_from(run.memory, _MASKS_AT)
    for bit, at, size, get, _ in _AREAS:
        if valid & bit:
            run.memory[at : at + size] = get(vcpu)
