"""The model-specific registers of one vCPU, as KVM has them: those that the CPU acts on, and those that only store.

Every access comes here: the guest's, because the CPU exits at RDMSR and WRMSR, and the VMM's. An index that is not
known raises #GP in the guest, and ends KVM_GET_MSRS and KVM_SET_MSRS. What KVM's paravirtual registers ask the host to
write to guest memory is not written; CPUID shows none of these features.

The TSC counts nanoseconds since the module was loaded, TSC_KHZ, so it is the same in all vCPUs of a process, and goes
on while a vCPU does not run.

Source: arch/x86/kvm/x86.c kvm_get_msr_common, kvm_set_msr_common, set_efer, __kvm_set_msr; arch/x86/include/asm/
msr-index.h for those of SNP guests.
"""

from __future__ import annotations

import time

from guestmem.cpu import uc_native
from guestmem.cpu.cpu_state import Cpu
from guestmem.cpu.engine import CpuidTable, PageBit
from guestmem.cpu.fast_calls import (
    MSR_CSTAR,
    MSR_FMASK,
    MSR_LSTAR,
    MSR_STAR,
    MSR_SYSENTER_CS,
    MSR_SYSENTER_EIP,
    MSR_SYSENTER_ESP,
)
from guestmem.cpu.guest_walk import CR0_PG, CR4_LA57, EFER_LMA, EFER_LME, EFER_NXE, EFER_SCE
from guestmem.cpu.x86_env import SEGMENTS

TSC_KHZ = 1_000_000
"""Of every vCPU."""

TSC, APIC_BASE, TSC_ADJUST, MTRR_CAP, MISC_ENABLE, PAT, EFER = 0x10, 0x1B, 0x3B, 0xFE, 0x1A0, 0x277, 0xC000_0080
GHCB, SEV_STATUS = 0xC001_0130, 0xC001_0131
"""Of SNP guests: the page, or the request, that VMGEXIT shows the hypervisor; what protects the guest."""
FS_BASE, GS_BASE, KERNEL_GS_BASE, TSC_AUX = range(0xC000_0100, 0xC000_0104)

_EPOCH_NS = time.monotonic_ns()
_CPU_FIELDS = {
    MSR_SYSENTER_CS: "sysenter_cs",
    MSR_SYSENTER_ESP: "sysenter_esp",
    MSR_SYSENTER_EIP: "sysenter_eip",
    MSR_STAR: "star",
    MSR_LSTAR: "lstar",
    MSR_CSTAR: "cstar",
    MSR_FMASK: "fmask",
    KERNEL_GS_BASE: "kernel_gs_base",
    TSC_AUX: "tsc_aux",
}
_SEGMENT_BASES = {FS_BASE: SEGMENTS.index("fs"), GS_BASE: SEGMENTS.index("gs")}
_CANONICAL = frozenset((MSR_SYSENTER_ESP, MSR_SYSENTER_EIP, MSR_LSTAR, MSR_CSTAR, FS_BASE, GS_BASE, KERNEL_GS_BASE))
_CONSTANT = {MTRR_CAP: 0x508, 0x17: 0, 0xCD: 3, 0x198: 4 << 40 | 1000}
"""MTRRs: 8 variable ones, fixed ones, write-combining. PLATFORM_ID, FSB_FREQ, PERF_STATUS: as KVM answers."""
_PARAVIRTUAL = (0x11, 0x12, *range(0x4B56_4D00, 0x4B56_4D09))
_MTRRS = (*range(0x200, 0x210), 0x250, 0x258, 0x259, *range(0x268, 0x270), 0x2FF)
_STORED = {
    # EBL_CR_POWERON, SMI_COUNT, FEATURE_CONTROL, SPEC_CTRL, PRED_CMD, UCODE_REV, SMBASE, PLATFORM_INFO, UMWAIT
    **dict.fromkeys((0x2A, 0x34, 0x3A, 0x48, 0x49, 0x9E, 0xCE, 0xE1), 0),
    0x8B: 0x0100_0000 << 32,
    # ARCH_CAPABILITIES, MISC_FEATURES_ENABLES, MCG_CAP, MCG_STATUS, MCG_CTL, DEBUGCTL, POWER_CTL, PERF_CAPABILITIES
    **dict.fromkeys((0x10A, 0x140, 0x179, 0x17A, 0x17B, 0x1D9, 0x1FC, 0x345, 0x6E0, 0xDA0), 0),
    MISC_ENABLE: 1,
    PAT: 0x0007_0406_0007_0406,
    0x4B56_4D05: 1,
    # AMD: SYSCFG, HWCR, NB_CFG, PATCH_LOADER, INT_PENDING, VM_HSAVE_PA, DC_CFG, BU_CFG2, DE_CFG
    **dict.fromkeys((0xC001_0010, 0xC001_0015, 0xC001_001F, 0xC001_0020, 0xC001_0055, 0xC001_0117), 0),
    **dict.fromkeys((0xC001_1022, 0xC001_1029, 0xC001_102A), 0),
    **dict.fromkeys(_MTRRS, 0),
}
_STORED |= {index: 0 for index in _PARAVIRTUAL if index not in _STORED}
_SNP_ENABLED = 0b111  # SEV, SEV-ES, SEV-SNP

SAVED: tuple[int, ...] = (
    MSR_SYSENTER_CS, MSR_SYSENTER_ESP, MSR_SYSENTER_EIP, MSR_STAR, MSR_CSTAR, KERNEL_GS_BASE, MSR_FMASK, MSR_LSTAR,
    TSC, PAT, 0xC001_0117, 0x3A, TSC_AUX, 0x48, *_PARAVIRTUAL, TSC_ADJUST, 0x6E0, 0x10A, 0x345, MISC_ENABLE,
    0x17A, 0x17B, 0x9E, 0x34, 0xCE, 0x140, 0x1FC, 0x8B, *_MTRRS,
)  # fmt: skip
"""What KVM_GET_MSR_INDEX_LIST lists: the registers that a VMM saves."""

_MASK_32, _MASK_64 = (1 << 32) - 1, (1 << 64) - 1
_MEMORY_TYPES = frozenset((0, 1, 4, 5, 6, 7))  # of PAT
_CPUID_NX, _CPUID_LM = 1 << 20, 1 << 29


class Msrs:
    """See the module. `apic_base` is also a field of struct kvm_sregs; `cpuid` is the table of the vCPU."""

    def __init__(self, handle: int, cpu: Cpu, page_bit: PageBit | None = None) -> None:
        self._handle, self._cpu = handle, cpu
        self._stored, self._constant = dict(_STORED), _CONSTANT
        if page_bit is not None and page_bit.set_is_private:
            self._stored[GHCB] = 0
            self._constant = _CONSTANT | {SEV_STATUS: _SNP_ENABLED}
        self._tsc_offset = self._tsc_adjust = 0
        self.apic_base = 0
        self.cpuid: CpuidTable = {}
        cpu.env.efer = 0

    def tsc(self) -> int:
        """The time-stamp counter, now."""
        return (time.monotonic_ns() - _EPOCH_NS) * TSC_KHZ // 1_000_000 + self._tsc_offset & _MASK_64

    def get(self, index: int) -> int | None:
        """The value; None if there is no such register."""
        if index in _CPU_FIELDS:
            return int(getattr(self._cpu.msrs, _CPU_FIELDS[index]))
        if index in _SEGMENT_BASES:
            return int(self._cpu.env.segs[_SEGMENT_BASES[index]].base)
        if index == TSC:
            return self.tsc()
        if index == TSC_ADJUST:
            return self._tsc_adjust
        if index == APIC_BASE:
            return self.apic_base
        if index == EFER:
            return int(self._cpu.env.efer)
        return self._stored.get(index, self._constant.get(index))

    def set(self, index: int, value: int, guest: bool = False) -> bool:
        """Whether it took the value. `guest`: the guest wants it, which is allowed less."""
        if index in _CANONICAL and not self._canonical(value):
            return False
        if index in _CPU_FIELDS:
            setattr(self._cpu.msrs, _CPU_FIELDS[index], value)
            return True
        if index in _SEGMENT_BASES:
            self._cpu.env.segs[_SEGMENT_BASES[index]].base = value
            return True
        if index in self._stored:
            if index == PAT and not {value >> shift & 0xFF for shift in range(0, 64, 8)} <= _MEMORY_TYPES:
                return False
            self._stored[index] = value
            return True
        return self._set_special(index, value, guest)

    def _set_special(self, index: int, value: int, guest: bool) -> bool:
        if index == EFER:
            return self._set_efer(value, guest)
        if index == TSC:
            change = value - self.tsc()
            self._tsc_offset += change
            self._tsc_adjust = self._tsc_adjust + change & _MASK_64 if guest else self._tsc_adjust
        elif index == TSC_ADJUST:
            self._tsc_offset += value - self._tsc_adjust if guest else 0
            self._tsc_adjust = value
        elif index == APIC_BASE:
            self.apic_base = value
        else:
            # What KVM never changes may be written back as it is.
            return not guest and self._constant.get(index) == value
        return True

    def _set_efer(self, value: int, guest: bool) -> bool:
        env = self._cpu.env
        allowed = EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE
        if guest:
            features = self.cpuid.get((0x8000_0001, 0), (0, 0, 0, _MASK_32))[3]
            allowed &= _MASK_32 if features & _CPUID_NX else ~EFER_NXE
            allowed &= _MASK_32 if features & _CPUID_LM else ~(EFER_LME | EFER_LMA)
        if value & ~allowed or (env.cr[0] & CR0_PG and (env.efer ^ value) & EFER_LME):
            return False
        env.efer = value & ~EFER_LMA | env.efer & EFER_LMA
        self._cpu.update_hflags()
        uc_native.flush_tlb(self._handle)
        return True

    def _canonical(self, value: int) -> bool:
        bits = 57 if self._cpu.env.cr[4] & CR4_LA57 else 48
        return value >> bits - 1 in (0, (1 << 65 - bits) - 1)
