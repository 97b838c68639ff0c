"""Machine checks: what a vCPU's guest sees of them, and errors that the VMM reports to it.

Source: arch/x86/kvm/x86.c kvm_vcpu_ioctl_x86_setup_mce, kvm_vcpu_ioctl_x86_set_mce.
"""

from __future__ import annotations

import dataclasses
import struct

from guestmem.kvm import mce
from guestmem.kvm.vcpu import Vcpu
from guestmem.serve.call import Call
from guestmem.serve.vcpu_state import cpu

_CAPABILITY = struct.Struct("<Q")
_MCE = struct.Struct("<QQQQB31x")  # status, addr, misc, mcg_status, bank
_CR4_MCE = 1 << 6


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
    raises = vcpu.machine_check.report(mce.Report(*_MCE.unpack(data)), bool(cr4 & _CR4_MCE))
    if raises is None:
        vcpu.triple_fault = True
    elif raises:
        events = cpu(vcpu).get_events()
        cpu(vcpu).set_events(
            dataclasses.replace(events, exception_injected=True, exception_nr=mce.VECTOR, exception_error_code=None)
        )


SIZES = _CAPABILITY.size, _MCE.size
