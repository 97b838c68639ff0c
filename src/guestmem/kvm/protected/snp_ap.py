"""AP creation: an SNP guest says with which page of its own another vCPU runs, or that it runs no more.

    CREATE_ON_INIT   at its next INIT; no interrupt controller is modelled that would send one
    CREATE           at once: the vCPU is kicked
    DESTROY          at once: it has no VMSA, and is halted

The guest goes on when the target is outside: it may take the page back with RMPADJUST then (known bug B45).

Source: arch/x86/kvm/svm/sev.c sev_snp_ap_creation; 309d28576f0a (KVM_REQUEST_WAIT).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from guestmem.arch.snp import SnpGuest
from guestmem.memory import PAGE_SIZE
from guestmem.uapi.kvm import MAX_PHYSICAL_ADDRESS_BITS

if TYPE_CHECKING:
    from guestmem.kvm.vm import Kvm

CREATE_ON_INIT, CREATE, DESTROY = 0, 1, 2
_2M = 1 << 21


async def creation(kvm: Kvm, info_1: int, vmsa_gpa: int, features: int) -> bool:
    """Whether it was a good request. The low half of `info_1` says what to do, the high half the APIC id of the target,
    which is the number of a vCPU. A VMSA at a multiple of 2M is refused: processors have an erratum there."""
    request, apic_id = info_1 & 0xFFFFFFFF, info_1 >> 32
    target = kvm.vcpus.get(apic_id)
    if target is None or target.guest_mode is None or request not in (CREATE_ON_INIT, CREATE, DESTROY):
        return False
    mode = target.guest_mode
    if request == DESTROY:
        mode.state_gpa = None
    elif features != _features(kvm) or not _may_be_vmsa(vmsa_gpa):
        return False
    else:
        mode.state_gpa = vmsa_gpa
    mode.waiting_for_reset = True
    if request != CREATE_ON_INIT:
        await mode.request()
    return True


def _features(kvm: Kvm) -> int:
    """SEV_FEATURES of every vCPU, as KVM_SEV_INIT2 had them."""
    guest = kvm.machine.architecture
    assert isinstance(guest, SnpGuest)
    return guest.vmsa_features


def _may_be_vmsa(gpa: int) -> bool:
    return not gpa % PAGE_SIZE and not gpa >> MAX_PHYSICAL_ADDRESS_BITS and bool(gpa % _2M)
