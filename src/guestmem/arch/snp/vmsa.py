"""The page that a vCPU of an SNP guest starts from, as firmware measures it: its registers at their places in the VMSA.

Segments and control registers are left zero: the vCPUs here have their state in an engine, and this page is what tells
two initial states apart. Source: APM volume 2, appendix B, table B-4.
"""

from __future__ import annotations

import struct

from guestmem.memory import PAGE_SIZE

_REGISTERS = struct.Struct("<18Q")  # struct kvm_regs: rax rbx rcx rdx rsi rdi rsp rbp r8 .. r15 rip rflags
_PLACES = (0x1F8, 0x318, 0x308, 0x310, 0x330, 0x338, 0x1D8, 0x328, *range(0x340, 0x380, 8), 0x178, 0x170)
_SEV_FEATURES = 0x3B0
SNP_ACTIVE = 1 << 0
DEBUG_SWAP = 1 << 5


def vmsa_page(registers: bytes, features: int = SNP_ACTIVE) -> bytes:
    """4096 bytes from a struct kvm_regs and the bits of SEV_FEATURES."""
    page = bytearray(PAGE_SIZE)
    for place, value in zip(_PLACES, _REGISTERS.unpack(registers), strict=True):
        struct.pack_into("<Q", page, place, value)
    struct.pack_into("<Q", page, _SEV_FEATURES, features)
    return bytes(page)
