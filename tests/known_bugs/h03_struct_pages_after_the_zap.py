"""H03: the struct pages for a split are looked for after the users were told, and there are none.

"HVO: vmemmap restored on split (may be ENOMEM)" stands after the unmap in the 1G series (spec/semantics.md section 10).
"""

from guestmem.check.mutants import mutant
from guestmem.memory import Access, Inode, PageRange
from guestmem.memory.convert import store
from guestmem.memory.restructure import PreparedSplit, prepare_split, present_parts


@mutant("H03", replaces="guestmem.memory.convert:store", breaks={"S15", "S13"})
def struct_pages_after_the_zap(inode: Inode, pages: PageRange, to: Access, split: PreparedSplit) -> None:
    """The access is stored, then the split fails."""
    inode.attributes.set(pages, to)
    if inode.order and to is Access.SHARED:
        prepare_split(inode.scheduler, inode.folios, present_parts(inode.folios, pages), pages.start).commit()
    _store(inode, pages, to, split)


_store = store
