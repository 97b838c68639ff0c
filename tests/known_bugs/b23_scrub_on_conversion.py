"""B23, one half: the hook for "page leaves the inode" also runs when a page is converted."""

from guestmem.check.mutants import mutant
from guestmem.memory import Access, Inode, PageRange

_convert = Inode.convert


@mutant("B23", replaces="guestmem.memory.guest_memfd:Inode.convert", breaks={"S12", "never"})
async def scrub_on_conversion(self: Inode, pages: PageRange, to: Access) -> None:
    """A conversion destroys the bytes that the architecture promised to keep."""
    await _convert(self, pages, to)
    self.backing.free(pages)
