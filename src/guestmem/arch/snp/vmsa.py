"""The VMSA: a page that holds the registers of a vCPU of an SNP guest while it is outside.


Offsets are those of struct sev_es_save_area. What an engine has no register for stays zero, but for SEV_FEATURES.

Source: APM volume 2, appendix B, table B-4; arch/x86/include/asm/svm.h.
"""

from __future__ import annotations

import dataclasses
import struct

from guestmem.cpu.registers import DescriptorTable, Regs, Segment, Sregs
from guestmem.memory import PAGE_SIZE

_REGISTERS = struct.Struct("<18Q")  # struct kvm_regs: rax rbx rcx rdx rsi rdi rsp rbp r8 .. r15 rip rflags
_PLACES = (0x1F8, 0x318, 0x308, 0x310, 0x330, 0x338, 0x1D8, 0x328, *range(0x340, 0x380, 8), 0x178, 0x170)
_SEV_FEATURES = 0x3B0
SNP_ACTIVE = 1 << 0
DEBUG_SWAP = 1 << 5
_SEGMENT = struct.Struct("<HHIQ")  # struct vmcb_seg: selector, attrib, limit, base
_SEGMENTS = {"es": 0x00, "cs": 0x10, "ss": 0x20, "ds": 0x30, "fs": 0x40, "gs": 0x50, "ldt": 0x70, "tr": 0x90}
_TABLES = {"gdt": 0x60, "idt": 0x80}
_CONTROL = {"efer": 0xD0, "cr4": 0x148, "cr3": 0x150, "cr0": 0x158, "cr2": 0x240}
_CPL = 0xCB
_ATTRIBUTES = {"type": (0, 4), "s": (4, 1), "dpl": (5, 2), "present": (7, 1), "avl": (8, 1), "l": (9, 1)}
_ATTRIBUTES |= {"db": (10, 1), "g": (11, 1)}


def vmsa_page(registers: bytes, features: int = SNP_ACTIVE) -> bytes:
    """4096 bytes from a struct kvm_regs and the bits of SEV_FEATURES: what firmware measures, so that two initial
    states have two digests."""
    page = bytearray(PAGE_SIZE)
    for place, value in zip(_PLACES, _REGISTERS.unpack(registers), strict=True):
        struct.pack_into("<Q", page, place, value)
    struct.pack_into("<Q", page, _SEV_FEATURES, features)
    return bytes(page)


def load(page: bytes) -> tuple[Regs, Sregs]:
    """What VMRUN loads from a page. RFLAGS bit 1 reads as one."""
    regs = Regs(*(struct.unpack_from("<Q", page, place)[0] for place in _PLACES))
    regs.rflags |= 2
    sregs = Sregs()
    for name, place in _SEGMENTS.items():
        setattr(sregs, name, _segment(page, place))
    for name, place in _TABLES.items():
        _, _, limit, base = _SEGMENT.unpack_from(page, place)
        setattr(sregs, name, DescriptorTable(base, limit & 0xFFFF))
    for name, place in _CONTROL.items():
        setattr(sregs, name, struct.unpack_from("<Q", page, place)[0])
    return regs, sregs


def save(page: bytes, regs: Regs, sregs: Sregs) -> bytes:
    """The page with what #VMEXIT stores into it."""
    new = bytearray(page)
    for place, value in zip(_PLACES, dataclasses.astuple(regs), strict=True):
        struct.pack_into("<Q", new, place, value)
    for name, place in _SEGMENTS.items():
        segment: Segment = getattr(sregs, name)
        _SEGMENT.pack_into(new, place, segment.selector, _attributes(segment), segment.limit, segment.base)
    for name, place in _TABLES.items():
        table: DescriptorTable = getattr(sregs, name)
        _SEGMENT.pack_into(new, place, 0, 0, table.limit, table.base)
    for name, place in _CONTROL.items():
        struct.pack_into("<Q", new, place, getattr(sregs, name))
    new[_CPL] = sregs.ss.dpl
    return bytes(new)


def _segment(page: bytes, place: int) -> Segment:
    selector, attributes, limit, base = _SEGMENT.unpack_from(page, place)
    fields = {name: attributes >> bit & (1 << width) - 1 for name, (bit, width) in _ATTRIBUTES.items()}
    return Segment(base=base, limit=limit, selector=selector, unusable=int(not fields["present"]), **fields)


def _attributes(segment: Segment) -> int:
    return sum(getattr(segment, name) << bit for name, (bit, _) in _ATTRIBUTES.items())
