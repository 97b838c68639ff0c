"""The frequency of the TSC, which is one for all vCPUs: without KVM_CAP_TSC_CONTROL there is nothing to scale it.

Source: arch/x86/kvm/x86.c kvm_arch_vm_ioctl, kvm_arch_vcpu_ioctl, set_tsc_khz.
"""

from __future__ import annotations

import errno

from guestmem.cpu.msrs import TSC_KHZ
from guestmem.serve.call import Call
from guestmem.trace import Refusal
from guestmem.uapi import kvm as uapi


async def _set_default(call: Call, khz: int) -> int:
    """What new vCPUs are asked to have. KVM does not say if they cannot. Raises: Refusal EINVAL `vm.has_vcpus`."""
    kvm = call.kvm
    if kvm.created_vcpus:
        raise Refusal(errno.EINVAL, "vm.has_vcpus", vcpus=kvm.created_vcpus)
    kvm.default_tsc_khz = khz
    return 0


async def _get_default(call: Call, argument: int) -> int:
    return call.kvm.default_tsc_khz or TSC_KHZ


async def _set(call: Call, khz: int) -> int:
    """0 is the host's own. A higher one KVM makes up for at each entry, which this one does not.

    Raises: Refusal EINVAL `tsc.frequency`.
    """
    if khz not in (0, TSC_KHZ):
        raise Refusal(errno.EINVAL, "tsc.frequency", khz=khz, host=TSC_KHZ)
    return 0


async def _get(call: Call, argument: int) -> int:
    return TSC_KHZ


OF_A_VM = {uapi.KVM_SET_TSC_KHZ: _set_default, uapi.KVM_GET_TSC_KHZ: _get_default}
OF_A_VCPU = {uapi.KVM_SET_TSC_KHZ: _set, uapi.KVM_GET_TSC_KHZ: _get}
