"""KVM_CHECK_EXTENSION: what each capability answers, by ABI level and, on a VM, by its type.

What is not listed is 0: not there. Numbers here are mainline's; a level says under which number its kernel has the same
capability, and may answer another value. Source: kvm_vm_ioctl_check_extension of both rooms; spec/uapi.md section 5;
golden_6_18.md rows C1 to C19.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from guestmem.kvm.gmem import supported_flags
from guestmem.kvm.vm import Kvm
from guestmem.uapi.kvm import (
    KVM_CAP_VM_COPY_ENC_CONTEXT_FROM,
    KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM,
    KVM_MEMORY_ATTRIBUTE_PRIVATE,
    KVM_USER_MEM_SLOTS,
)
from guestmem.uapi.levels import MAINLINE, AbiLevel

MAX_VCPUS = 64
EXIT_HYPERCALL, DISABLE_QUIRKS, DISABLE_QUIRKS2, SPLIT_IRQCHIP = 201, 116, 213, 121
EXIT_HYPERCALL_VALID = 1 << 12
QUIRKS_VALID = 0xFF

_CONSTANT = {
    0: 1,  # IRQCHIP
    3: 1,  # USER_MEMORY
    4: 1,  # SET_TSS_ADDR
    7: 1,  # EXT_CPUID
    10: KVM_USER_MEM_SLOTS,
    14: 1,  # MP_STATE
    15: 2,  # COALESCED_MMIO: the page of its ring
    16: 1,  # SYNC_MMU
    21: 1,  # DESTROY_MEMORY_REGION_WORKS
    30: 1,  # JOIN_MEMORY_REGIONS_WORKS
    33: 1,  # PIT2
    36: 1,  # IOEVENTFD
    37: 1,  # SET_IDENTITY_MAP_ADDR
    39: 1,  # ADJUST_CLOCK
    41: 1,  # VCPU_EVENTS
    50: 1,  # DEBUGREGS
    55: 1,  # XSAVE
    56: 1,  # XCRS
    60: 1,  # TSC_CONTROL
    61: 1,  # GET_TSC_KHZ
    66: MAX_VCPUS,
    81: 1,  # READONLY_MEM
    98: 1,  # ENABLE_CAP_VM
    SPLIT_IRQCHIP: 1,
    128: MAX_VCPUS,  # MAX_VCPU_ID
    136: 1,  # IMMEDIATE_EXIT
    DISABLE_QUIRKS: QUIRKS_VALID,
    EXIT_HYPERCALL: EXIT_HYPERCALL_VALID,
    209: 1,  # SYS_ATTRIBUTES
    DISABLE_QUIRKS2: QUIRKS_VALID,
    231: 1,  # USER_MEMORY2
    232: 1,  # MEMORY_FAULT_INFO
    236: 1,  # PRE_FAULT_MEMORY
}


def check_extension(level: AbiLevel, kvm: Kvm | None, number: int) -> int:
    """The answer on /dev/kvm (`kvm` None) or on a VM."""
    name = level.capability(number)
    if name is None:
        return 0
    if name in level.answers:
        return level.answers[name]
    if name in _POSTED:
        return _POSTED[name](level)
    number = MAINLINE.get(name, -1)
    special = _SPECIAL.get(number)
    return special(level, kvm) if special is not None else _CONSTANT.get(number, 0)


def _memory_attributes(level: AbiLevel, kvm: Kvm | None) -> int:
    if kvm is not None:
        return kvm.supported_vm_attributes
    return 0 if level.in_place else KVM_MEMORY_ATTRIBUTE_PRIVATE


def _guest_memfd_flags(level: AbiLevel, kvm: Kvm | None) -> int:
    if kvm is not None:
        return supported_flags(kvm)
    return sum(level.create_flags.values())


def _gmem_attributes(level: AbiLevel, kvm: Kvm | None) -> int:
    """KVM_CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES: on /dev/kvm, and on a VM with private memory, where pages are converted in
    place. Source: kvm_vm_ioctl_check_extension_generic, as applied for 7.4."""
    has = level.in_place and (kvm is None or kvm.has_private_memory)
    return KVM_MEMORY_ATTRIBUTE_PRIVATE if has else 0


_SPECIAL: dict[int, Callable[[AbiLevel, Kvm | None], int]] = {
    9: lambda level, kvm: min(os.cpu_count() or 1, MAX_VCPUS),  # NR_VCPUS, recommended
    233: _memory_attributes,
    234: lambda level, kvm: int(kvm is None or level.mmap or kvm.has_private_memory),  # GUEST_MEMFD
    235: lambda level, kvm: level.vm_type_mask,
    KVM_CAP_VM_COPY_ENC_CONTEXT_FROM: lambda level, kvm: int(level.link),
    KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM: lambda level, kvm: int(level.link),
    244: _guest_memfd_flags,
    252: _gmem_attributes,
}
_POSTED: dict[str, Callable[[AbiLevel], int]] = {
    "USERFAULT": lambda level: int("USERFAULT" in level.region_flags),
}
"""By name, since mainline has no number for them."""
