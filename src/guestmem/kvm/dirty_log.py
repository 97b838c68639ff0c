"""KVM_GET_DIRTY_LOG: which frames of a slot were written since it was last asked.

A slot that is logged has its leaves read-only until the first write to each, which is noted and mapped writable; asking
takes the notes and write-protects those frames again. Source: virt/kvm/kvm_main.c kvm_get_dirty_log_protect.
"""

from __future__ import annotations

import errno

from guestmem.kvm.addresses import Gfn
from guestmem.kvm.memslots import MemorySlot
from guestmem.kvm.vm import Kvm
from guestmem.memory import Access, Range
from guestmem.trace import Refusal


async def get_dirty_log(kvm: Kvm, slot_id: int) -> bytes:
    """The bitmap of a slot, one bit a frame, in whole 64-bit words. Raises: Refusal ENOENT `dirty_log.none`."""
    async with kvm.slots_lock:
        slot = _logged_slot(kvm, slot_id)
        dirty = sorted(slot.dirty or ())
        await _clean(kvm, slot, dirty)
        return _bitmap(dirty, slot.gfns.pages)


async def clear_dirty_log(kvm: Kvm, slot_id: int, first: int, pages: int, bitmap: bytes) -> None:
    """Forget the frames whose bit is set, `pages` of them from `first` on.

    Raises: Refusal ENOENT `dirty_log.none`; EINVAL `dirty_log.range`.
    """
    async with kvm.slots_lock:
        slot = _logged_slot(kvm, slot_id)
        if first + pages > slot.gfns.pages:
            raise Refusal(errno.EINVAL, "dirty_log.range", first=first, pages=pages)
        bits = int.from_bytes(bitmap, "little")
        await _clean(kvm, slot, [page for page in slot.dirty or () if page >= first and bits >> (page - first) & 1])


def _logged_slot(kvm: Kvm, slot_id: int) -> MemorySlot:
    slot = kvm.memslots.by_id.get(slot_id)
    if slot is None or slot.dirty is None:
        raise Refusal(errno.ENOENT, "dirty_log.none", slot=slot_id)
    return slot


async def _clean(kvm: Kvm, slot: MemorySlot, dirty: list[int]) -> None:
    """Take the notes back before the leaves go, so that a write in between is noted anew and not lost."""
    assert slot.dirty is not None
    slot.dirty.difference_update(dirty)
    async with kvm.stage2.mmu_lock:
        for page in dirty:
            gfn = slot.gfns.start + page
            kvm.stage2.zap(Range(Gfn(gfn), Gfn(gfn + 1)), (Access.SHARED,))
        await kvm.stage2.flush_remote()


def _bitmap(dirty: list[int], pages: int) -> bytes:
    data = bytearray(-(-pages // 64) * 8)
    for page in dirty:
        data[page >> 3] |= 1 << (page & 7)
    return bytes(data)
