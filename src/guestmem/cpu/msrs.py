"""Numbers of model-specific registers, and those that a VMM saves. What they do is in native/msrs.c.

Source: arch/x86/include/asm/msr-index.h; arch/x86/kvm/x86.c msrs_to_save_base, emulated_msrs_all.
"""

from __future__ import annotations

TSC_KHZ = 1_000_000
"""Of every vCPU: the TSC counts nanoseconds."""

TSC, APIC_BASE, TSC_ADJUST, MTRR_CAP, MISC_ENABLE, PAT, EFER = 0x10, 0x1B, 0x3B, 0xFE, 0x1A0, 0x277, 0xC000_0080
SYSENTER_CS, SYSENTER_ESP, SYSENTER_EIP = 0x174, 0x175, 0x176
STAR, LSTAR, CSTAR, FMASK = range(0xC000_0081, 0xC000_0085)
FS_BASE, GS_BASE, KERNEL_GS_BASE, TSC_AUX = range(0xC000_0100, 0xC000_0104)
GHCB, SEV_STATUS = 0xC001_0130, 0xC001_0131
"""Of SNP guests: the page, or the request, that VMGEXIT shows the hypervisor; what protects the guest."""

_PARAVIRTUAL = (0x11, 0x12, *range(0x4B56_4D00, 0x4B56_4D09))
_MTRRS = (*range(0x200, 0x210), 0x250, 0x258, 0x259, *range(0x268, 0x270), 0x2FF)

SAVED: tuple[int, ...] = (
    SYSENTER_CS, SYSENTER_ESP, SYSENTER_EIP, STAR, CSTAR, KERNEL_GS_BASE, FMASK, LSTAR,
    TSC, PAT, 0xC001_0117, 0x3A, TSC_AUX, 0x48, *_PARAVIRTUAL, TSC_ADJUST, 0x6E0, 0x10A, 0x345, MISC_ENABLE,
    0x17A, 0x17B, 0x9E, 0x34, 0xCE, 0x140, 0x1FC, 0x8B, *_MTRRS,
)  # fmt: skip
"""What KVM_GET_MSR_INDEX_LIST lists: the registers that a VMM saves."""
