"""The MSR protocol: what an SNP guest can ask without a GHCB, in the value of the GHCB MSR, and is answered there.

Source: arch/x86/include/asm/sev-common.h; arch/x86/kvm/svm/sev.c sev_handle_vmgexit_msr_protocol, snp_begin_psc_msr.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from guestmem.arch.snp import C_BIT
from guestmem.cpu.cpuid import lookup
from guestmem.kvm.exits import HypercallExit, SystemEventExit
from guestmem.memory import PAGE_SHIFT
from guestmem.uapi.kvm import KVM_HC_MAP_GPA_RANGE, KVM_MAP_GPA_RANGE_ENCRYPTED, KVM_SYSTEM_EVENT_SEV_TERM

if TYPE_CHECKING:
    from guestmem.kvm.vcpu import Vcpu

INFO_MASK = 0xFFF
SEV_INFO_RESP, SEV_INFO_REQ = 0x001, 0x002
CPUID_REQ, CPUID_RESP = 0x004, 0x005
PREF_GPA_REQ, PREF_GPA_RESP = 0x010, 0x011
REG_GPA_REQ, REG_GPA_RESP = 0x012, 0x013
PSC_REQ, PSC_RESP = 0x014, 0x015
HV_FT_REQ, HV_FT_RESP = 0x080, 0x081
TERM_REQ = 0x100

PSC_RESP_ERROR = 1 << 63 | PSC_RESP
PRIVATE, SHARED = 1, 2
FEATURES = 1 << 0 | 1 << 1
"""GHCB_HV_FT_SNP, GHCB_HV_FT_SNP_AP_CREATION."""
_VERSION_MAX, _VERSION_MIN = 2, 1
_DATA = (1 << 52) - 1


def answer(vcpu: Vcpu, value: int) -> int | HypercallExit | SystemEventExit:
    """The new value of the MSR, or what userspace is to do. A request that KVM does not know leaves the value alone."""
    answer = _ANSWERS.get(value & INFO_MASK)
    return value if answer is None else answer(vcpu, value)


def _sev_info(vcpu: Vcpu, value: int) -> int:
    return _VERSION_MAX << 48 | _VERSION_MIN << 32 | C_BIT.position << 24 | SEV_INFO_RESP


def _cpuid(vcpu: Vcpu, value: int) -> int:
    found = cpuid(vcpu, value >> 32, 0)[value >> 30 & 3]
    return found << 32 | value & 0xFFFFF000 | CPUID_RESP


def _hv_features(vcpu: Vcpu, value: int) -> int:
    return FEATURES << 12 | HV_FT_RESP


def _preferred_gpa(vcpu: Vcpu, value: int) -> int:
    """None: the guest chooses."""
    return _DATA << 12 | PREF_GPA_RESP


def _register_gpa(vcpu: Vcpu, value: int) -> int:
    return value & ~INFO_MASK | REG_GPA_RESP


def _terminate(vcpu: Vcpu, value: int) -> SystemEventExit:
    return SystemEventExit(KVM_SYSTEM_EVENT_SEV_TERM, (value,))


def cpuid(vcpu: Vcpu, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
    """EAX, EBX, ECX, EDX as KVM_SET_CPUID2 has them; zeros for a leaf that there is not."""
    return lookup(vcpu.cpuid, leaf, subleaf)


def _page_state_change(vcpu: Vcpu, value: int) -> int | HypercallExit:
    gpa = (value >> 12 & (1 << 40) - 1) << PAGE_SHIFT
    operation = value >> 52 & 0xF
    if operation not in (PRIVATE, SHARED) or not vcpu.kvm.enabled_hypercalls >> KVM_HC_MAP_GPA_RANGE & 1:
        return PSC_RESP_ERROR
    attributes = KVM_MAP_GPA_RANGE_ENCRYPTED if operation == PRIVATE else 0
    return HypercallExit(KVM_HC_MAP_GPA_RANGE, (gpa, 1, attributes))


_ANSWERS: dict[int, Callable[[Vcpu, int], int | HypercallExit | SystemEventExit]] = {
    SEV_INFO_REQ: _sev_info,
    CPUID_REQ: _cpuid,
    HV_FT_REQ: _hv_features,
    PREF_GPA_REQ: _preferred_gpa,
    REG_GPA_REQ: _register_gpa,
    PSC_REQ: _page_state_change,
    TERM_REQ: _terminate,
}
