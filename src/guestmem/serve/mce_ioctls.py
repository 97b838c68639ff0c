"""Machine checks: what a vCPU's guest sees of them, and errors that the VMM reports to it.

Source: arch/x86/kvm/x86.c kvm_vcpu_ioctl_x86_setup_mce, kvm_vcpu_ioctl_x86_set_mce.
"""

from __future__ import annotations

import struct

from guestmem.cpu.x86 import CR4_MCE
from guestmem.kvm import mce
from guestmem.kvm.vcpu import Vcpu
from guestmem.serve.call import Call
from guestmem.serve.vcpu_state import inject_exception

_CAPABILITY = struct.Struct("<Q")
_MCE = struct.Struct("<QQQQB31x")  # status, addr, misc, mcg_status, bank


async def get_mce_cap_supported(call: Call, argument: int) -> int:
    """KVM_X86_GET_MCE_CAP_SUPPORTED, of /dev/kvm."""
    await call.client.memory.copy_to_user(argument, _CAPABILITY.pack(mce.SUPPORTED))
    return 0


def setup_mce(vcpu: Vcpu, data: bytes) -> None:
    """KVM_X86_SETUP_MCE. Raises: Refusal EINVAL `mce.capability`."""
    vcpu.machine_check.setup(*_CAPABILITY.unpack(data))


def set_mce(vcpu: Vcpu, data: bytes) -> None:
    """KVM_X86_SET_MCE. A guest that cannot take the #MC now is shut down. Raises: Refusal as MachineCheck.report."""
    cr4 = vcpu.engine.get_sregs().cr4
    raises = vcpu.machine_check.report(mce.Report(*_MCE.unpack(data)), bool(cr4 & CR4_MCE))
    if raises is None:
        vcpu.triple_fault = True
    elif raises:
        inject_exception(vcpu, mce.VECTOR)
