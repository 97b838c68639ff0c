"""KVM Userfault: pages that the VMM has yet to bring, by a bitmap in its own memory. For post-copy and lazy restore.

A slot with KVM_MEM_USERFAULT names a bitmap, one bit a frame. A guest's access to a frame whose bit is set ends KVM_RUN
with KVM_EXIT_MEMORY_FAULT and KVM_MEMORY_EXIT_FLAG_USERFAULT; the VMM brings the page, clears the bit and runs again.
KVM only reads the bitmap, at each fault; setting a bit later does not take a mapping away. KVM's own accesses look too,
since they go by stage 2 here: kvmclock's page or a GHCB that has yet to be brought is not there. In a kernel they go by
the host address and do not look.

Source: "[PATCH v3 00/15] KVM: Introduce KVM Userfault", kvm_do_userfault.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from guestmem.kvm.addresses import Gfn
from guestmem.kvm.memslots import MemorySlot
from guestmem.memory.notifier import BOTH
from guestmem.trace import Refusal

if TYPE_CHECKING:
    from guestmem.kvm.vm import Kvm

_WORD_BITS = 64


def bitmap_bytes(pages: int) -> int:
    """The size of a slot's bitmap: whole words of 64 bits."""
    return -(-pages // _WORD_BITS) * 8


async def check(kvm: Kvm, slot: MemorySlot, gfn: Gfn) -> None:
    """Before a frame of a slot is mapped. Raises: Refusal EFAULT `fault.userfault`; `user.copy` if the bitmap cannot be
    read."""
    if slot.userfault_bitmap is None:
        return
    word, bit = divmod(gfn - slot.gfns.start, _WORD_BITS)
    data = await kvm.mm.copy_from_user(slot.userfault_bitmap + word * 8, 8)
    if int.from_bytes(data, "little") >> bit & 1:
        raise Refusal(errno.EFAULT, "fault.userfault", slot=slot.id, gfn=gfn)


async def change(kvm: Kvm, slot: MemorySlot, flags: int, bitmap: int | None) -> None:
    """Turn it on or off on a slot that exists. slots_lock held.

    Turned on, all of the slot is unmapped once nobody is left who read the slot without a bitmap. Turned off nothing
    is: what is mapped was brought. Source: kvm_arch_commit_memory_region, kvm_arch_userfault_enabled.
    """
    slot.flags, slot.userfault_bitmap = flags, bitmap
    await kvm.swap_memslots(kvm.memslots.replace(None, None))
    if bitmap is not None:
        async with kvm.stage2.mmu_lock:
            kvm.stage2.zap(slot.gfns, BOTH)
