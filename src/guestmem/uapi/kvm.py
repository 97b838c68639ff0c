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


def _io(nr: int) -> int:
    return KVMIO << 8 | nr


def _ior(nr: int, size: int) -> int:
    return 2 << 30 | size << 16 | KVMIO << 8 | nr


# /dev/kvm
KVM_GET_API_VERSION = _io(0x00)
KVM_CREATE_VM = _io(0x01)
KVM_GET_MSR_INDEX_LIST = _iowr(0x02, 4)
KVM_CHECK_EXTENSION = _io(0x03)
KVM_GET_VCPU_MMAP_SIZE = _io(0x04)
KVM_GET_SUPPORTED_CPUID = _iowr(0x05, 8)
KVM_GET_EMULATED_CPUID = _iowr(0x09, 8)
KVM_GET_MSR_FEATURE_INDEX_LIST = _iowr(0x0A, 4)
KVM_GET_DEVICE_ATTR = _iow(0xE2, 24)
KVM_HAS_DEVICE_ATTR = _iow(0xE3, 24)

# VM
KVM_CREATE_VCPU = _io(0x41)
KVM_GET_DIRTY_LOG = _iow(0x42, 16)
KVM_SET_NR_MMU_PAGES = _io(0x44)
KVM_GET_NR_MMU_PAGES = _io(0x45)
KVM_SET_TSS_ADDR = _io(0x47)
KVM_SET_IDENTITY_MAP_ADDR = _iow(0x48, 8)
KVM_CREATE_IRQCHIP = _io(0x60)
KVM_IRQ_LINE = _iow(0x61, 8)
KVM_GET_IRQCHIP = _iowr(0x62, 520)
KVM_SET_IRQCHIP = _ior(0x63, 520)
KVM_IRQ_LINE_STATUS = _iowr(0x67, 8)
KVM_REGISTER_COALESCED_MMIO = _iow(0x67, 16)
KVM_UNREGISTER_COALESCED_MMIO = _iow(0x68, 16)
KVM_SET_GSI_ROUTING = _iow(0x6A, 8)
KVM_REINJECT_CONTROL = _io(0x71)
KVM_IRQFD = _iow(0x76, 32)
KVM_CREATE_PIT2 = _iow(0x77, 64)
KVM_SET_BOOT_CPU_ID = _io(0x78)
KVM_IOEVENTFD = _iow(0x79, 64)
KVM_SET_CLOCK = _iow(0x7B, 48)
KVM_GET_CLOCK = _ior(0x7C, 48)
KVM_GET_PIT2 = _ior(0x9F, 112)
KVM_SET_PIT2 = _iow(0xA0, 112)
KVM_SIGNAL_MSI = _iow(0xA5, 32)
KVM_MEMORY_ENCRYPT_OP = _iowr(0xBA, 8)

# KVM_MEMORY_ENCRYPT_OP's commands on an SNP VM
KVM_SEV_INIT2 = 22
KVM_SEV_SNP_LAUNCH_START = 100
KVM_SEV_SNP_LAUNCH_UPDATE = 101
KVM_SEV_SNP_LAUNCH_FINISH = 102
# and on a TDX VM (the second and third on a vCPU of it)
KVM_TDX_INIT_VM = 1
KVM_TDX_INIT_VCPU = 2
KVM_TDX_INIT_MEM_REGION = 3
KVM_TDX_FINALIZE_VM = 4
KVM_TDX_MEASURE_MEMORY_REGION = 1

# vCPU, or VM and vCPU
KVM_RUN = _io(0x80)
KVM_GET_REGS = _ior(0x81, 144)
KVM_SET_REGS = _iow(0x82, 144)
KVM_GET_SREGS = _ior(0x83, 312)
KVM_SET_SREGS = _iow(0x84, 312)
KVM_TRANSLATE = _iowr(0x85, 24)
KVM_INTERRUPT = _iow(0x86, 4)
KVM_GET_MSRS = _iowr(0x88, 8)
KVM_SET_MSRS = _iow(0x89, 8)
KVM_SET_SIGNAL_MASK = _iow(0x8B, 4)
KVM_GET_FPU = _ior(0x8C, 416)
KVM_SET_FPU = _iow(0x8D, 416)
KVM_GET_LAPIC = _ior(0x8E, 1024)
KVM_SET_LAPIC = _iow(0x8F, 1024)
KVM_SET_CPUID2 = _iow(0x90, 8)
KVM_GET_CPUID2 = _iowr(0x91, 8)
KVM_GET_MP_STATE = _ior(0x98, 4)
KVM_SET_MP_STATE = _iow(0x99, 4)
KVM_NMI = _io(0x9A)
KVM_GET_VCPU_EVENTS = _ior(0x9F, 64)
KVM_SET_VCPU_EVENTS = _iow(0xA0, 64)
KVM_GET_DEBUGREGS = _ior(0xA1, 128)
KVM_SET_DEBUGREGS = _iow(0xA2, 128)
KVM_SET_TSC_KHZ = _io(0xA2)
KVM_GET_TSC_KHZ = _io(0xA3)
KVM_ENABLE_CAP = _iow(0xA3, 104)
KVM_GET_XSAVE = _ior(0xA4, 4096)
KVM_SET_XSAVE = _iow(0xA5, 4096)
KVM_GET_XCRS = _ior(0xA6, 392)
KVM_SET_XCRS = _iow(0xA7, 392)
KVM_KVMCLOCK_CTRL = _io(0xAD)
KVM_CLEAR_DIRTY_LOG = _iowr(0xC0, 24)

# guest_memfd
KVM_SET_USER_MEMORY_REGION = _iow(0x46, 32)
KVM_SET_USER_MEMORY_REGION2 = _iow(0x49, 160)
KVM_SET_MEMORY_ATTRIBUTES = _iow(0xD2, 32)
KVM_SET_MEMORY_ATTRIBUTES2 = _iowr(0xD2, 128)  # proposed, on the guest_memfd fd
KVM_CREATE_GUEST_MEMFD = _iowr(0xD4, 64)
KVM_GMEM_CONVERT_SHARED = 0xC040AF41  # proposed, on the guest_memfd fd; type 0xAF is its own
KVM_GMEM_CONVERT_PRIVATE = 0xC040AF42
KVM_PRE_FAULT_MEMORY = _iowr(0xD5, 64)
KVM_LINK_GUEST_MEMFD = _iowr(0xD6, 64)  # proposed, on the destination's VM fd

# KVM_ENABLE_CAP on the destination's VM fd; args[0] is the source's
KVM_CAP_VM_COPY_ENC_CONTEXT_FROM = 197
KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM = 206

KVM_MEM_LOG_DIRTY_PAGES = 1 << 0
KVM_MEM_READONLY = 1 << 1
KVM_MEM_GUEST_MEMFD = 1 << 2
KVM_MEM_USERFAULT = 1 << 3  # proposed

GUEST_MEMFD_FLAG_MMAP = 1 << 0
GUEST_MEMFD_FLAG_INIT_SHARED = 1 << 1
GUEST_MEMFD_FLAG_HUGETLB = 1 << 2  # proposed; log2 of the page size stands in bits 63:58
GUEST_MEMFD_HUGETLB_SHIFT = 58

GUEST_MEMFD_MAGIC = 0x474D454D  # f_type of its file system

KVM_MEMORY_ATTRIBUTE_PRIVATE = 1 << 3
KVM_MEMORY_EXIT_FLAG_PRIVATE = 1 << 3
KVM_MEMORY_EXIT_FLAG_USERFAULT = 1 << 4  # proposed

KVM_MP_STATE_RUNNABLE = 0
KVM_MP_STATE_HALTED = 3
KVM_SYSTEM_EVENT_SEV_TERM = 6
KVM_SYSTEM_EVENT_TDX_FATAL = 7
KVM_HC_MAP_GPA_RANGE = 12
KVM_MAP_GPA_RANGE_PAGE_SZ_2M = 1
KVM_MAP_GPA_RANGE_ENCRYPTED = 1 << 4
KVM_ENOSYS = 1000
KVM_EINVAL = 22
KVM_EPERM = 1

KVM_USER_MEM_SLOTS = 32764
KVM_MEM_MAX_NR_PAGES = (1 << 31) - 1
KVM_ADDRESS_SPACE_NUM = 1
MAX_PHYSICAL_ADDRESS_BITS = 52


class VmType(enum.IntEnum):
    """KVM_CREATE_VM's argument, as far as it is built."""

    DEFAULT = 0
    SW_PROTECTED = 1
    SNP = 4
    TDX = 5
    ARM_REALM = 1 << 8
    ARM_PROTECTED = 1 << 31
