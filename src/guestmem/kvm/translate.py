"""KVM_TRANSLATE: a linear address of the guest to its guest-physical address, as the VMM's debugger wants it.

Access rights are not looked at, nor whether the address is canonical; accessed bits are not set, and a table that is no
memory ends it.

Source: arch/x86/kvm/x86.c kvm_arch_vcpu_ioctl_translate, kvm_mmu_gva_to_gpa_system.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from guestmem.cpu.x86 import CR0_PG, CR4_LA57, CR4_PAE, CR4_PSE, EFER_LMA, PTE_ADDRESS, PTE_P, PTE_PS
from guestmem.kvm.protected.guest_page import map_guest

if TYPE_CHECKING:
    from guestmem.kvm.vcpu import Vcpu

_ADDRESS_32 = 0xFFFF_F000


async def translate(vcpu: Vcpu, linear: int) -> int | None:
    """The guest-physical address; None if nothing is mapped there."""
    sregs = vcpu.engine.get_sregs()
    if not sregs.cr0 & CR0_PG:
        return linear
    if sregs.efer & EFER_LMA:
        bits = 57 if sregs.cr4 & CR4_LA57 else 48
        return await _walk(vcpu, linear, sregs.cr3 & PTE_ADDRESS, tuple(range(bits - 9, 11, -9)))
    linear &= 0xFFFF_FFFF
    if sregs.cr4 & CR4_PAE:
        return await _walk(vcpu, linear, sregs.cr3 & 0xFFFF_FFE0, (30, 21, 12))
    return await _walk_32(vcpu, linear, sregs.cr3 & _ADDRESS_32, bool(sregs.cr4 & CR4_PSE))


async def _walk(vcpu: Vcpu, linear: int, table: int, shifts: tuple[int, ...]) -> int | None:
    """Entries of 8 bytes; pages of 2M and, in long mode, of 1G."""
    for shift in shifts:
        entry = await _read(vcpu, table + (linear >> shift & 0x1FF) * 8, 8)
        if entry is None or not entry & PTE_P:
            return None
        table = entry & PTE_ADDRESS & ~_page_bit(vcpu)
        may_be_large = shift == 21 or (shift == 30 and len(shifts) > 3)
        if shift == 12 or (entry & PTE_PS and may_be_large):
            inside = (1 << shift) - 1
            return table & ~inside | linear & inside
    return None


async def _walk_32(vcpu: Vcpu, linear: int, table: int, large_pages: bool) -> int | None:
    """Entries of 4 bytes; pages of 4M, whose upper address bits stand in bits 13 to 20 (PSE-36)."""
    entry = await _read(vcpu, table + (linear >> 22) * 4, 4)
    if entry is None or not entry & PTE_P:
        return None
    if entry & PTE_PS and large_pages:
        return (entry & 0x1F_E000) << 19 | entry & 0xFFC0_0000 | linear & 0x3F_FFFF
    entry = await _read(vcpu, (entry & _ADDRESS_32) + (linear >> 12 & 0x3FF) * 4, 4)
    if entry is None or not entry & PTE_P:
        return None
    return entry & _ADDRESS_32 | linear & 0xFFF


def _page_bit(vcpu: Vcpu) -> int:
    bit = vcpu.kvm.stage2.page_bit
    return 1 << bit.position if bit is not None else 0


async def _read(vcpu: Vcpu, gpa: int, size: int) -> int | None:
    """An entry of a table; None if there is no shared memory to read it from."""
    hva = await map_guest(vcpu.kvm, gpa & ~_page_bit(vcpu), write=False)
    return int.from_bytes(ctypes.string_at(hva, size), "little") if hva is not None else None
