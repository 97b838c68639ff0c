"""CPUID: the default tables, and the lookup.

The default describes what Unicorn executes (QEMU 5's TCG: SSE4.2 and BMI, no AVX), under KVM's signature.
"""

from __future__ import annotations

from guestmem.cpu.engine import CpuidTable, PageBit

INDEXED = frozenset(
    (4, 7, 0xB, 0xD, 0xF, 0x10, 0x12, 0x14, 0x17, 0x18, 0x1D, 0x1E, 0x1F, 0x24, 0x8000_001D, 0x8000_0026)
)


def _bits(*numbers: int) -> int:
    return sum(1 << number for number in numbers)


def _text(text: bytes) -> tuple[int, int, int]:
    """Twelve characters as three registers."""
    a, b, c = (int.from_bytes(text[i : i + 4], "little") for i in (0, 4, 8))
    return a, b, c


_VENDOR = _text(b"AuthenticAMD")
_KVM = _text(b"KVMKVMKVM\0\0\0")
# FPU VME DE PSE TSC MSR PAE MCE CX8 SEP MTRR PGE MCA CMOV PAT PSE36 CLFSH MMX FXSR SSE SSE2; no APIC.
_FEATURES_EDX = 0x078B_F9FF
# The same again without SEP and CLFSH, then SYSCALL NX PDPE1GB RDTSCP LM.
_EXTENDED_EDX = (_FEATURES_EDX & 0x0183_F3FF) | _bits(11, 20, 26, 27, 29)

DEFAULT_CPUID: CpuidTable = {
    (0, 0): (7, _VENDOR[0], _VENDOR[2], _VENDOR[1]),
    # SSE3 PCLMUL SSSE3 CX16 SSE4.1 SSE4.2 MOVBE POPCNT AES RDRAND, and the bit of a hypervisor
    (1, 0): (0x0080_0F12, 0x0800, _bits(0, 1, 9, 13, 19, 20, 22, 23, 25, 30, 31), _FEATURES_EDX),
    # FSGSBASE BMI1 SMEP BMI2 ADX SMAP; LA57
    (7, 0): (0, _bits(0, 3, 7, 8, 19, 20), _bits(16), 0),
    (0x4000_0000, 0): (0x4000_0001, *_KVM),
    (0x4000_0001, 0): (0, 0, 0, 0),
    (0x8000_0000, 0): (0x8000_0008, _VENDOR[0], _VENDOR[2], _VENDOR[1]),
    (0x8000_0001, 0): (0x0080_0F12, 0, _bits(0, 5, 6, 8), _EXTENDED_EDX),
    (0x8000_0008, 0): (57 << 8 | 48, 0, 0, 0),
}
"""Vendor AuthenticAMD, long mode, 48 physical and 57 linear bits, the signature of KVM at leaf 0x40000000."""


def default(page_bit: PageBit | None) -> CpuidTable:
    """The table of a guest with this page bit: SEV, SEV-ES, SEV-SNP and the place of the C-bit for one of SNP.

    Source: AMD APM vol. 3, Fn8000_001F; arch/x86/kvm/cpuid.c __do_cpuid_func, which gives 0 for the bits that
    encryption takes from the physical address. A TD finds its bit by TDCALL.
    """
    if page_bit is None or not page_bit.set_is_private:
        return DEFAULT_CPUID
    return DEFAULT_CPUID | {
        (0x8000_0000, 0): (0x8000_001F, *DEFAULT_CPUID[0x8000_0000, 0][1:]),
        (0x8000_001F, 0): (_bits(1, 3, 4), page_bit.position, 0, 0),
    }


def lookup(table: CpuidTable, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
    """EAX, EBX, ECX, EDX; zeros for a leaf that the table does not have."""
    answer = table.get((leaf, subleaf))
    if answer is None and leaf not in INDEXED:
        answer = table.get((leaf, 0))
    return answer or (0, 0, 0, 0)
