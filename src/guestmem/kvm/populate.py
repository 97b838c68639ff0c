"""Populate: putting a VM's first bytes into its private memory before it runs.

What SNP_LAUNCH_UPDATE, TDX_INIT_MEM_REGION and CCA's populate share. KVM's initiative; the provider only answers.

Source: virt/kvm/guest_memfd.c kvm_gmem_populate; spec/semantics.md section 7.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from typing import TypeAlias

from guestmem.kvm.addresses import Gfn
from guestmem.kvm.context import KvmGmemContext
from guestmem.kvm.memslots import MemorySlot
from guestmem.kvm.vm import Kvm, PinnedPage
from guestmem.memory import PAGE_SIZE, Access, File, Page, write_host
from guestmem.trace import Refusal

PostPopulate: TypeAlias = Callable[[Gfn, Page, "PinnedPage | None"], Awaitable[None]]
"""What a VM type does with each page: add it, measure it. It gets the page that was looked up and must not look again
(known bug B15)."""


async def copy_source(gfn: Gfn, page: Page, source: PinnedPage | None) -> None:
    """PostPopulate of a software-protected VM: the source's bytes, as they are."""
    if source is not None:
        write_host(page.hva, await source.read(0, PAGE_SIZE))


async def populate(
    kvm: Kvm,
    gfn: Gfn,
    source_hva: int | None,
    pages: int,
    post_populate: PostPopulate = copy_source,
    *,
    corrects_source: bool = False,
) -> int:
    """Fill private pages of a guest_memfd slot from the host's memory, one after another; how many were done.

    `source_hva` None leaves what is in the page. With `corrects_source` the source may be written to, so it must be
    writable (known bug B16). Ends at the end of the slot, at an error or at a signal.

    Raises, only if not one page was done: Refusal EINVAL `populate.range`, `populate.not_gmem`, `populate.shared`;
    EFAULT `fault.file_gone`, `user.page`; EINTR `populate.interrupted`; what Inode.fault refuses.
    """
    if pages <= 0 or (source_hva or 0) % PAGE_SIZE:
        raise Refusal(errno.EINVAL, "populate.range", pages=pages, source=source_hva or 0)
    held: list[File] = []
    try:
        async with kvm.slots_lock:
            slot = kvm.memslots.find(gfn)
            if slot is None or not slot.has_gmem:
                raise Refusal(errno.EINVAL, "populate.not_gmem", gfn=gfn)
            context = slot.context
            if context is None or not context.file.get_unless_dying():
                raise Refusal(errno.EFAULT, "fault.file_gone", slot=slot.id, gfn=gfn)
            held.append(context.file)
            return await _populate_slot(context, slot, gfn, source_hva, pages, post_populate, corrects_source)
    finally:
        for file in held:
            await file.put()


async def _populate_slot(
    context: KvmGmemContext,
    slot: MemorySlot,
    gfn: Gfn,
    source_hva: int | None,
    pages: int,
    post_populate: PostPopulate,
    corrects_source: bool,
) -> int:
    kvm = context.kvm
    done = 0
    while done < min(pages, slot.gfns.end - gfn):
        try:
            if kvm.scheduler.signal_pending:
                raise Refusal(errno.EINTR, "populate.interrupted", done=done)
            source = source_hva + done * PAGE_SIZE if source_hva is not None else None
            await _populate_page(context, slot, Gfn(gfn + done), source, post_populate, corrects_source)
        except Refusal:
            if not done:
                raise
            break
        done += 1
    return done


async def _populate_page(
    context: KvmGmemContext,
    slot: MemorySlot,
    gfn: Gfn,
    source_hva: int | None,
    post_populate: PostPopulate,
    corrects_source: bool,
) -> None:
    """One page. Its source is pinned before invalidate_lock is taken: the source may be a mapping of this very file,
    and faulting that in takes mmap_lock, which comes first (known bug B13)."""
    kvm = context.kvm
    source = await kvm.mm.pin_page(source_hva, write=corrects_source) if source_hva is not None else None
    try:
        async with context.inode.invalidate_lock.exclusive:
            if kvm.access_of(gfn, slot) is not Access.PRIVATE:
                raise Refusal(errno.EINVAL, "populate.shared", gfn=gfn)
            page = await context.page_at(slot, gfn, Access.PRIVATE)
            await post_populate(gfn, page, source)
    finally:
        if source is not None:
            source.put()
