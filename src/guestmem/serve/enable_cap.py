"""KVM_ENABLE_CAP: what can be switched on, of a VM and of a vCPU.

Source: arch/x86/kvm/x86.c kvm_vm_ioctl_enable_cap, kvm_vcpu_ioctl_enable_cap; virt/kvm/kvm_main.c
kvm_vm_ioctl_enable_cap_generic.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from typing import NamedTuple

from guestmem.kvm import vm_irqchip
from guestmem.kvm.enc_context import copy_enc_context_from, move_enc_context_from
from guestmem.kvm.vm import Kvm
from guestmem.serve import capabilities, msr_filter_ioctls
from guestmem.serve.call import Call, CallFiles
from guestmem.trace import Refusal
from guestmem.uapi import kvm as uapi

_ENABLE_CAP = struct.Struct("<II4Q64x")
_ANY = (1 << 64) - 1
_MSR_REASONS = uapi.KVM_MSR_EXIT_REASON_INVAL | uapi.KVM_MSR_EXIT_REASON_UNKNOWN | uapi.KVM_MSR_EXIT_REASON_FILTER


async def enable_vm_cap(call: Call, argument: int) -> int:
    """Raises: Refusal EINVAL `enable_cap.argument`; as what it switches on."""
    cap, flags, value, *_ = _ENABLE_CAP.unpack(await call.client.memory.copy_from_user(argument, _ENABLE_CAP.size))
    kvm = call.kvm
    if not flags and kvm.level.link and cap in _CONTEXT_FROM:
        files = CallFiles(call)
        await files.look_up(value & 0xFFFF_FFFF)
        await _CONTEXT_FROM[cap](kvm, files, value & 0xFFFF_FFFF)
        return 0
    known = _OF_A_VM.get(cap)
    if flags or known is None or value & ~known.valid:
        raise Refusal(errno.EINVAL, "enable_cap.argument", cap=cap, flags=flags, value=value)
    known.enable(kvm, value)
    return 0


async def enable_vcpu_cap(call: Call, argument: int) -> int:
    """Nothing that there is here: Hyper-V's controllers and paravirtual features only a kernel with them has.

    Raises: Refusal EINVAL `enable_cap.argument`.
    """
    cap, flags, value, *_ = _ENABLE_CAP.unpack(await call.client.memory.copy_from_user(argument, _ENABLE_CAP.size))
    if not flags and cap == capabilities.ENFORCE_PV_FEATURE_CPUID:
        return 0  # what CPUID does not show, the guest cannot use here anyway
    raise Refusal(errno.EINVAL, "enable_cap.argument", cap=cap, flags=flags, value=value)


_CONTEXT_FROM = {
    uapi.KVM_CAP_VM_COPY_ENC_CONTEXT_FROM: copy_enc_context_from,
    uapi.KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM: move_enc_context_from,
}


class _Enabled(NamedTuple):
    """`valid`: bits that args[0] may have."""

    valid: int
    enable: Callable[[Kvm, int], None]


def _no_difference(kvm: Kvm, value: int) -> None:
    """Nothing that we do depends on it: a quirk that we do not have, how long a host polls."""


def _enable_hypercalls(kvm: Kvm, value: int) -> None:
    kvm.enabled_hypercalls = value


def _limit_vcpu_ids(kvm: Kvm, value: int) -> None:
    """Raises: Refusal EINVAL `enable_cap.argument`: once, before the first vCPU, not more than there can
    be and not less than the boot CPU has."""
    if value == kvm.max_vcpu_ids:
        return
    is_late = kvm.created_vcpus or kvm.max_vcpu_ids != uapi.KVM_MAX_VCPU_IDS
    if is_late or not kvm.bsp_vcpu_id <= value <= uapi.KVM_MAX_VCPU_IDS:
        raise Refusal(errno.EINVAL, "enable_cap.argument", cap=capabilities.MAX_VCPU_ID, value=value)
    kvm.max_vcpu_ids = value or uapi.KVM_MAX_VCPU_IDS


def _exception_payload(kvm: Kvm, value: int) -> None:
    kvm.exception_payload = bool(value)


def _triple_fault_event(kvm: Kvm, value: int) -> None:
    kvm.triple_fault_event = bool(value)


_OF_A_VM = {
    capabilities.DISABLE_QUIRKS: _Enabled(_ANY, _no_difference),
    capabilities.SPLIT_IRQCHIP: _Enabled(_ANY, vm_irqchip.split_irqchip),  # how many lines, checked there
    capabilities.MAX_VCPU_ID: _Enabled(_ANY, _limit_vcpu_ids),
    capabilities.X2APIC_API: _Enabled(capabilities.X2APIC_API_VALID, vm_irqchip.enable_x2apic_api),
    capabilities.EXCEPTION_PAYLOAD: _Enabled(_ANY, _exception_payload),
    capabilities.HALT_POLL: _Enabled(0xFFFF_FFFF, _no_difference),
    capabilities.USER_SPACE_MSR: _Enabled(_MSR_REASONS, msr_filter_ioctls.user_space_msrs),
    capabilities.EXIT_HYPERCALL: _Enabled(capabilities.EXIT_HYPERCALL_VALID, _enable_hypercalls),
    capabilities.DISABLE_QUIRKS2: _Enabled(capabilities.QUIRKS_VALID, _no_difference),
    capabilities.TRIPLE_FAULT_EVENT: _Enabled(_ANY, _triple_fault_event),
}
"""HALT_POLL is what it says for a host that sleeps: ours does."""
