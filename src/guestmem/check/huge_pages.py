"""What the properties ask of huge pages: S13, no folio spans both accesses; S14, the books of HugeTLB and HVO balance.

Each count is made anew from what is in files and in hands, and compared with the count that the books keep.
"""

from __future__ import annotations

from collections.abc import Iterator

from guestmem.check.world import World
from guestmem.memory import Access, Inode, PageIndex, Range, Subpool
from guestmem.memory.vmemmap import split_cost


def shared_huge_folios(world: World) -> Iterator[str]:
    """Folios larger than 4K that have a shared page in them."""
    for inode in _huge_files(world):
        for run, access in inode.runs(Range(PageIndex(0), PageIndex(inode.pages))):
            for part in inode.folios.present_in(run) if access is Access.SHARED else ():
                for order, blocks in inode.folios.splits.missing(part):
                    yield f"folio of order {order} at page {blocks.min() << order:#x} of inode {inode.number} is shared"


def broken_books(world: World) -> Iterator[str]:
    """What does not balance. At a quiet moment: who takes a page has it in his hands for a while."""
    files = list(_huge_files(world))
    units = list({id(folio.unit): folio.unit for folio in world.pool.detached.values()}.values())
    whole = 0
    for order, pool in world.hugetlb.pools.items():
        in_files = sum(len(inode.folios.present) >> order for inode in files if inode.order == order)
        held = sum(unit.pfns.pages == 1 << order for unit in units if unit.pfns.start not in world.pool.retired)
        if pool.used != in_files + held:
            yield f"{pool.used} huge pages of order {order} are in use, {in_files} are in files and {held} held"
        reserved = sum(
            inode.source.reserved for inode in files if inode.order == order and isinstance(inode.source, Subpool)
        )
        if pool.reserved != reserved or pool.reserved > pool.free or pool.charged != pool.reserved + pool.used:
            yield (
                f"order {order}: {pool.reserved} reserved and {pool.charged} charged; {reserved} are reserved by files,"
                f" {pool.free} free, {pool.used} in use"
            )
        whole += (pool.total + pool.retired) * split_cost(order, 0)
    for inode in files:
        for order, blocks in inode.folios.splits.split.items():
            for number in blocks:
                if number << order not in inode.folios.present:
                    yield f"page {number << order:#x} of inode {inode.number} is split into folios and not there"
    if world.pool.retired:  # what a retired page was split into stays with it, and is in no book
        return
    given_back = sum(inode.folios.splits.cost(list(inode.folios.splits.split.items())) for inode in files)
    given_back += sum(unit.vmemmap for unit in units)
    if world.hugetlb.vmemmap.saved != whole - given_back:
        yield f"{world.hugetlb.vmemmap.saved} pages of vmemmap are saved; of {whole} splits have {given_back}"


def _huge_files(world: World) -> Iterator[Inode]:
    return (inode for inode in world.inodes if inode.order and not inode.destroyed)
