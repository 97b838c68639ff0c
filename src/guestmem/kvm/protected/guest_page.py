"""Shared memory of a guest that KVM itself reads and writes: its GHCB, and buffers that a call names.

Source: virt/kvm/kvm_main.c kvm_read_guest_page, kvm_write_guest_page.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from guestmem.cpu.engine import Translation
from guestmem.kvm.mmu import FaultResult, page_fault
from guestmem.kvm.stage2 import USER_MEMORY
from guestmem.memory import PAGE_SIZE, read_host, write_host
from guestmem.trace import Refusal

if TYPE_CHECKING:
    from guestmem.kvm.vm import Kvm


async def read_guest(kvm: Kvm, gpa: int, size: int) -> bytes | None:
    """`size` bytes inside of one page; None if no shared memory is there."""
    found = await _map(kvm, gpa, size)
    if found is None:
        return None
    hva = found.hva + gpa % PAGE_SIZE
    if found.window != USER_MEMORY:
        return read_host(hva, size)
    try:
        return await kvm.mm.copy_from_user(hva, size)
    except Refusal:
        return None


async def write_guest(kvm: Kvm, gpa: int, data: bytes) -> bool:
    """Bytes inside of one page; False if no shared memory is there to be written."""
    found = await _map(kvm, gpa, len(data))
    if found is None:
        return False
    hva = found.hva + gpa % PAGE_SIZE
    if found.window != USER_MEMORY:
        write_host(hva, data)
        return True
    try:
        await kvm.mm.copy_to_user(hva, data)
    except Refusal:
        return False
    return True


async def _map(kvm: Kvm, gpa: int, size: int) -> Translation | None:
    """Where the page is, good until the next await if it is here."""
    assert gpa % PAGE_SIZE + size <= PAGE_SIZE, "an access of KVM's own crosses a page"
    while True:
        found = kvm.stage2.translate(gpa, True, False)
        if found is not None:
            return found
        try:
            result = await page_fault(kvm, gpa, write=True, private=False)
        except Refusal:
            return None
        if result is FaultResult.MMIO:
            return None
        await kvm.scheduler.cond_resched("guest page mapped")
