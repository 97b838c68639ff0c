"""What a debugger in the VMM asks: KVM_TRANSLATE, KVM_SET_GUEST_DEBUG.

Source: arch/x86/kvm/x86.c kvm_arch_vcpu_ioctl_translate, kvm_arch_vcpu_ioctl_set_guest_debug.
"""

from __future__ import annotations

import errno
import struct

from guestmem.kvm.translate import translate as translate_linear
from guestmem.serve.call import Call
from guestmem.serve.files import VcpuFile
from guestmem.serve.vcpu_state import cpu, inject_exception
from guestmem.trace import Refusal
from guestmem.uapi import kvm as uapi

_TRANSLATION = struct.Struct("<QQBBB5x")  # linear_address, physical_address, valid, writeable, usermode
_GUEST_DEBUG = struct.Struct("<I4x8Q")  # control, debugreg
_NOT_MAPPED = (1 << 64) - 1
_DB, _BP = 1, 3


async def translate(call: Call, argument: int) -> int:
    """KVM_TRANSLATE. An address that is not mapped is no error: `valid` is 0."""
    assert isinstance(call.file, VcpuFile)
    vcpu, memory = call.file.vcpu, call.client.memory
    linear, *_ = _TRANSLATION.unpack(await memory.copy_from_user(argument, _TRANSLATION.size))
    async with vcpu.mutex:
        physical = await translate_linear(vcpu, linear)
    physical = _NOT_MAPPED if physical is None else physical
    answer = _TRANSLATION.pack(linear, physical, physical != _NOT_MAPPED, 1, 0)
    await memory.copy_to_user(argument, answer)
    return 0


async def set_guest_debug(call: Call, argument: int) -> int:
    """Raises: Refusal EINVAL `guest_debug.protected`, whose registers are the guest's own; EBUSY `guest_debug.pending`,
    if an exception waits where one is to be injected."""
    assert isinstance(call.file, VcpuFile)
    vcpu = call.file.vcpu
    data = await call.client.memory.copy_from_user(argument, _GUEST_DEBUG.size)
    control, *registers = _GUEST_DEBUG.unpack(data)
    if vcpu.guest_mode is not None:
        raise Refusal(errno.EINVAL, "guest_debug.protected", vcpu=vcpu.number)
    async with vcpu.mutex:
        if control & (uapi.KVM_GUESTDBG_INJECT_DB | uapi.KVM_GUESTDBG_INJECT_BP):
            events = cpu(vcpu).get_events()
            if events.exception_pending or events.exception_injected:
                raise Refusal(errno.EBUSY, "guest_debug.pending", exception=events.exception_nr)
            inject_exception(vcpu, _DB if control & uapi.KVM_GUESTDBG_INJECT_DB else _BP)
        cpu(vcpu).set_guest_debug(control if control & uapi.KVM_GUESTDBG_ENABLE else 0, tuple(registers))
    return 0
