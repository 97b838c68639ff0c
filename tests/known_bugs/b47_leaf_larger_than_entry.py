"""B47 at the time of mapping: folio and area would allow a 2M leaf, the RMP has the pages one by one."""

from collections.abc import Iterable

from guestmem.check.mutants import mutant
from guestmem.iommu.addresses import IoPage
from guestmem.iommu.leaves import GmemLeaf


@mutant("B47", replaces="guestmem.iommu.secure:largest_fitting", breaks={"S13"})
def leaf_larger_than_entry(leaf: GmemLeaf, page: IoPage, orders: Iterable[int]) -> GmemLeaf | None:
    """The tables are not asked: any page of the leaf that the guest has will do."""
    rules = leaf.rules
    assert rules is not None
    return leaf if any(rules.fits(leaf.part(IoPage(page), 0).block) for page in range(leaf.page, leaf.end)) else None
