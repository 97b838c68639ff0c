"""Numbers of the KVM interface that guest_memfd programs use.

Source: include/uapi/linux/kvm.h, arch/x86/include/uapi/asm/kvm.h, include/uapi/linux/kvm_para.h; what is only proposed
is marked so. spec/uapi.md sections 2, 4 and 5.
"""

from __future__ import annotations

import enum

KVMIO = 0xAE


def _iow(nr: int, size: int) -> int:
    return 1 << 30 | size << 16 | KVMIO << 8 | nr


def _iowr(nr: int, size: int) -> int:
    return 3 << 30 | size << 16 | KVMIO << 8 | nr


KVM_SET_USER_MEMORY_REGION = _iow(0x46, 32)
KVM_SET_USER_MEMORY_REGION2 = _iow(0x49, 160)
KVM_SET_MEMORY_ATTRIBUTES = _iow(0xD2, 32)
KVM_SET_MEMORY_ATTRIBUTES2 = _iowr(0xD2, 128)  # proposed, on the guest_memfd fd
KVM_CREATE_GUEST_MEMFD = _iowr(0xD4, 64)
KVM_PRE_FAULT_MEMORY = _iowr(0xD5, 64)

KVM_MEM_LOG_DIRTY_PAGES = 1 << 0
KVM_MEM_READONLY = 1 << 1
KVM_MEM_GUEST_MEMFD = 1 << 2

GUEST_MEMFD_FLAG_MMAP = 1 << 0
GUEST_MEMFD_FLAG_INIT_SHARED = 1 << 1

KVM_MEMORY_ATTRIBUTE_PRIVATE = 1 << 3
KVM_MEMORY_EXIT_FLAG_PRIVATE = 1 << 3

KVM_HC_MAP_GPA_RANGE = 12
KVM_MAP_GPA_RANGE_ENCRYPTED = 1 << 4
KVM_ENOSYS = 1000
KVM_EINVAL = 22
KVM_EPERM = 1

KVM_USER_MEM_SLOTS = 32764
KVM_MEM_MAX_NR_PAGES = (1 << 31) - 1
KVM_ADDRESS_SPACE_NUM = 1
MAX_PHYSICAL_ADDRESS_BITS = 52


class VmType(enum.IntEnum):
    """KVM_CREATE_VM's argument on x86, as far as it is built."""

    DEFAULT = 0
    SW_PROTECTED = 1
