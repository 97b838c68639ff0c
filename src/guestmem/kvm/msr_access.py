"""RDMSR and WRMSR that a guest's engine leaves to KVM: filtered, executed, #GP, or an exit for the VMM to decide.

Source: arch/x86/kvm/x86.c kvm_emulate_rdmsr, kvm_emulate_wrmsr, kvm_msr_user_space, complete_fast_msr_access.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from guestmem.cpu.engine import ReadMsr, WriteMsr
from guestmem.kvm.exits import MsrExit
from guestmem.kvm.vcpu_msrs import get_msr, is_known, set_msr
from guestmem.uapi.kvm import (
    KVM_MSR_EXIT_REASON_FILTER,
    KVM_MSR_EXIT_REASON_INVAL,
    KVM_MSR_EXIT_REASON_UNKNOWN,
)

if TYPE_CHECKING:
    from guestmem.kvm.vcpu import Vcpu

_GP = 13
_UNKNOWN_REASONS = KVM_MSR_EXIT_REASON_UNKNOWN | KVM_MSR_EXIT_REASON_INVAL


def access(vcpu: Vcpu, stop: ReadMsr | WriteMsr) -> MsrExit | None:
    """Do it; None if the guest goes on."""
    write = isinstance(stop, WriteMsr)
    value = stop.value if isinstance(stop, WriteMsr) else 0
    if not vcpu.kvm.msr_filter.allows(stop.index, write):
        return _denied(vcpu, MsrExit(stop.index, write, KVM_MSR_EXIT_REASON_FILTER, value))
    if isinstance(stop, WriteMsr):
        answer = 0 if set_msr(vcpu, stop.index, value, from_guest=True) else None
    else:
        answer = get_msr(vcpu, stop.index, from_guest=True)
    if answer is None:
        known = is_known(vcpu, stop.index)
        reason = KVM_MSR_EXIT_REASON_INVAL if known else KVM_MSR_EXIT_REASON_UNKNOWN
        return _denied(vcpu, MsrExit(stop.index, write, reason, value))
    vcpu.engine.complete(answer)
    return None


def _denied(vcpu: Vcpu, exit_: MsrExit) -> MsrExit | None:
    if vcpu.kvm.user_space_msrs & exit_.reason:
        return exit_
    vcpu.engine.raise_exception(_GP, 0)
    return None


def answered(vcpu: Vcpu, exit_: MsrExit) -> None:
    """What the VMM filled into the exit."""
    if exit_.error:
        vcpu.engine.raise_exception(_GP, 0)
    else:
        vcpu.engine.complete(exit_.data)


def update_stops(vcpu: Vcpu) -> None:
    """Tell the engine at which registers it has to ask, after a change of the filter or of what is asked."""
    kvm = vcpu.kvm
    vcpu.engine.set_stop_msrs(
        vcpu.msr_stops + kvm.msr_filter.stops(), unknown=bool(kvm.user_space_msrs & _UNKNOWN_REASONS)
    )
