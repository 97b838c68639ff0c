"""Shared pages of a guest that KVM itself reads and writes: its GHCB, and buffers that a call names.

Source: virt/kvm/kvm_main.c kvm_vcpu_map, kvm_read_guest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from guestmem.kvm.mmu import FaultResult, page_fault
from guestmem.memory import PAGE_SIZE
from guestmem.trace import Refusal

if TYPE_CHECKING:
    from guestmem.kvm.vm import Kvm


async def map_guest(kvm: Kvm, gpa: int, write: bool = True) -> int | None:
    """The server's address of `gpa`, good to write, or only to read, until the next await; None if no shared memory is
    there."""
    while True:
        found = kvm.stage2.translate(gpa, write, False)
        if found is not None:
            return found.hva + gpa % PAGE_SIZE
        try:
            result = await page_fault(kvm, gpa, write=write, private=False)
        except Refusal:
            return None
        if result is FaultResult.MMIO:
            return None
        await kvm.scheduler.cond_resched("guest page mapped")
