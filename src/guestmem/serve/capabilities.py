"""KVM_CHECK_EXTENSION: what each capability answers, by ABI level and, on a VM, by its type.

What is not listed is 0: not there. Numbers here are mainline's; a level says under which number its kernel has the same
capability, and may answer another value. Source: kvm_vm_ioctl_check_extension of both rooms; spec/uapi.md section 5;
golden_6_18.md rows C1 to C19.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from guestmem.kvm import kvmclock
from guestmem.kvm.gmem import supported_flags
from guestmem.kvm.irqchip import chip, routing
from guestmem.kvm.mce import MAX_BANKS
from guestmem.kvm.vm import Kvm
from guestmem.serve import sync_regs
from guestmem.uapi.kvm import (
    KVM_CAP_VM_COPY_ENC_CONTEXT_FROM,
    KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM,
    KVM_MAX_VCPU_IDS,
    KVM_MAX_VCPUS,
    KVM_MEMORY_ATTRIBUTE_PRIVATE,
    KVM_USER_MEM_SLOTS,
)
from guestmem.uapi.levels import MAINLINE, AbiLevel

EXIT_HYPERCALL, DISABLE_QUIRKS, DISABLE_QUIRKS2, SPLIT_IRQCHIP, X2APIC_API = 201, 116, 213, 121, 129
MAX_VCPU_ID, EXCEPTION_PAYLOAD, HALT_POLL, USER_SPACE_MSR, ENFORCE_PV_FEATURE_CPUID = 128, 164, 182, 188, 190
TRIPLE_FAULT_EVENT = 218
EXIT_HYPERCALL_VALID = 1 << 12
QUIRKS_VALID = 0xFF
X2APIC_API_VALID = chip.X2APIC_API
_GUEST_DEBUG = 0x1F_0003  # ENABLE, SINGLESTEP, USE_SW_BP, USE_HW_BP, INJECT_DB, INJECT_BP, BLOCKIRQ

_CONSTANT = {
    0: 1,  # IRQCHIP
    1: 1,  # HLT
    2: 1,  # MMU_SHADOW_CACHE_CONTROL
    3: 1,  # USER_MEMORY
    4: 1,  # SET_TSS_ADDR
    7: 1,  # EXT_CPUID
    8: 1,  # CLOCKSOURCE
    10: KVM_USER_MEM_SLOTS,
    11: 1,  # PIT
    12: 1,  # NOP_IO_DELAY
    14: 1,  # MP_STATE
    15: 2,  # COALESCED_MMIO: the page of its ring
    16: 1,  # SYNC_MMU
    21: 1,  # DESTROY_MEMORY_REGION_WORKS
    22: 1,  # USER_NMI
    23: 1,  # SET_GUEST_DEBUG
    24: 1,  # REINJECT_CONTROL
    25: routing.MAX_ROUTES,  # IRQ_ROUTING
    26: 1,  # IRQ_INJECT_STATUS
    30: 1,  # JOIN_MEMORY_REGIONS_WORKS
    31: MAX_BANKS,  # MCE
    32: 1,  # IRQFD
    33: 1,  # PIT2
    34: 1,  # SET_BOOT_CPU_ID
    35: 1,  # PIT_STATE2
    36: 1,  # IOEVENTFD
    37: 1,  # SET_IDENTITY_MAP_ADDR
    39: kvmclock.CLOCK_FLAGS,  # ADJUST_CLOCK
    40: 1,  # INTERNAL_ERROR_DATA
    41: 1,  # VCPU_EVENTS
    50: 1,  # DEBUGREGS
    51: 1,  # X86_ROBUST_SINGLESTEP
    54: 1,  # ENABLE_CAP
    55: 1,  # XSAVE
    56: 1,  # XCRS
    61: 1,  # GET_TSC_KHZ
    66: KVM_MAX_VCPUS,
    72: 1,  # TSC_DEADLINE_TIMER
    74: sync_regs.VALID,  # SYNC_REGS: regs, sregs, events
    76: 1,  # KVMCLOCK_CTRL
    77: 1,  # SIGNAL_MSI
    81: 1,  # READONLY_MEM
    82: 1,  # IRQFD_RESAMPLE
    89: 1,  # DEVICE_CTRL
    95: 1,  # EXT_EMUL_CPUID
    98: 1,  # ENABLE_CAP_VM
    100: 1,  # IOEVENTFD_NO_LENGTH
    105: 1,  # CHECK_EXTENSION_VM
    DISABLE_QUIRKS: 1,
    SPLIT_IRQCHIP: 1,
    122: 1,  # IOEVENTFD_ANY_LENGTH
    MAX_VCPU_ID: KVM_MAX_VCPU_IDS,
    136: 1,  # IMMEDIATE_EXIT
    153: 1,  # GET_MSR_FEATURES
    162: 1,  # COALESCED_PIO
    EXCEPTION_PAYLOAD: 1,
    HALT_POLL: 1,
    USER_SPACE_MSR: 1,
    189: 1,  # X86_MSR_FILTER
    ENFORCE_PV_FEATURE_CPUID: 1,
    195: _GUEST_DEBUG,  # SET_GUEST_DEBUG2
    200: 1,  # SREGS2
    EXIT_HYPERCALL: EXIT_HYPERCALL_VALID,
    208: 4096,  # XSAVE2: bytes
    209: 1,  # SYS_ATTRIBUTES
    DISABLE_QUIRKS2: QUIRKS_VALID,
    215: 1,  # SYSTEM_EVENT_DATA
    TRIPLE_FAULT_EVENT: 1,
    231: 1,  # USER_MEMORY2
    232: 1,  # MEMORY_FAULT_INFO
    236: 1,  # PRE_FAULT_MEMORY
}
"""Names: uapi/capability_names.py. Not there, though a kernel of today has it: VAPIC (6), ASYNC_PF (59, 183),
TSC_CONTROL (60), X86_DISABLE_EXITS (143), manual dirty log protection (168), PMU (173, 226), dirty rings (192, 223),
statistics (203), exits at emulation failures (204), Hyper-V, Xen, nested guests, SMM."""


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


def _x2apic_api(level: AbiLevel, kvm: Kvm | None) -> int:
    """Whether EOI broadcasts may be suppressed is known once there is an IOAPIC, or is none."""
    is_split = kvm is None or (kvm.irqchip is not None and kvm.irqchip.is_split)
    return X2APIC_API_VALID if is_split else X2APIC_API_VALID & ~chip.X2APIC_SUPPRESS_EOI


_SPECIAL: dict[int, Callable[[AbiLevel, Kvm | None], int]] = {
    9: lambda level, kvm: min(os.cpu_count() or 1, KVM_MAX_VCPUS),  # NR_VCPUS, recommended
    233: _memory_attributes,
    234: lambda level, kvm: int(kvm is None or level.mmap or kvm.has_private_memory),  # GUEST_MEMFD
    235: lambda level, kvm: level.vm_type_mask,
    X2APIC_API: _x2apic_api,
    KVM_CAP_VM_COPY_ENC_CONTEXT_FROM: lambda level, kvm: int(level.link),
    KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM: lambda level, kvm: int(level.link),
    244: _guest_memfd_flags,
    252: _gmem_attributes,
}
_POSTED: dict[str, Callable[[AbiLevel], int]] = {
    "USERFAULT": lambda level: int("USERFAULT" in level.region_flags),
}
"""By name, since mainline has no number for them."""
