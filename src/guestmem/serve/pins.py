"""Long-term pins of a client's memory, as gup_test and the IOMMU take them."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from guestmem.memory import Access, FolioReference
from guestmem.serve.client_memory import PinnedHostPage
from guestmem.serve.gmem_mappings import PROT_WRITE, GmemArea
from guestmem.trace import Refusal

if TYPE_CHECKING:
    from guestmem.serve.client import Client


async def pin_long_term(client: Client, hva: int, write: bool) -> FolioReference | PinnedHostPage:
    """The page at an address, held until it is put; of a guest_memfd by a counted reference.

    The look at the page and the reference are made under the lock that conversions take exclusively (known bug B24).
    Raises: Refusal EFAULT `user.page`.
    """
    area = client.memory.area_at(hva)
    if not isinstance(area, GmemArea):
        return await client.memory.pin_page(hva, write)
    if write and not area.prot & PROT_WRITE:
        raise Refusal(errno.EFAULT, "user.page", hva=hva, write=write)
    inode, index = area.inode, area.index_of(hva)
    async with inode.invalidate_lock.shared:
        try:
            await inode.fault(area.mappings.registration, index, Access.SHARED)
        except Refusal as refusal:
            raise Refusal(errno.EFAULT, "user.page", hva=hva, write=write) from refusal
        return inode.folios.get(index)
