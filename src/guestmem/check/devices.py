"""What the properties ask of IO page tables and IOTLBs, beside what they ask of every user alike."""

from __future__ import annotations

from collections.abc import Iterator

from guestmem.check.world import World, device_leaves, domains
from guestmem.iommu.areas import PinnedArea
from guestmem.iommu.leaves import GmemLeaf
from guestmem.memory import PageIndex, Pfn, Range
from guestmem.memory.pages import block


def stale_translations(world: World) -> Iterator[str]:
    """S3: what is cached is in the table, and who maps a pinned page has the pin."""
    for who, ioas, _, leaf in device_leaves(world):
        if not isinstance(leaf, GmemLeaf):
            area = ioas.area_at(leaf.page)
            if not isinstance(area, PinnedArea) or leaf.pinned not in area.source.held.values():
                yield f"{who} maps a page whose pin was given back"
    for _, domain in domains(world):
        for cached in domain.iotlb.leaves():
            current = domain.table.lookup(cached.page)
            if current is None or current.place_at(cached.page) != cached.place_at(cached.page):
                yield f"the IOTLB of domain {domain.number} has {cached.page << 12:#x}, its table no longer has it"


def open_windows(world: World) -> Iterator[str]:
    """S4, when nobody is invalidating."""
    for _, domain in domains(world):
        if domain.window.open:
            yield f"{domain.window.open} windows of domain {domain.number} are open and nobody is invalidating"


def exposed_pages(world: World) -> Iterator[str]:
    """S1: no table says that a page is a guest's which an untrusted device can reach."""
    for who, _, domain, leaf in device_leaves(world):
        if domain.trusted or not isinstance(leaf, GmemLeaf) or leaf.rules is None:
            continue
        for platform in world.platforms.values():
            for inside in range(1 << leaf.order):
                owner = platform.owner(Pfn(leaf.pfn + inside))
                if owner is not None:
                    yield f"{who} reaches pfn {leaf.pfn + inside}, which is {owner}'s"


def freed_pages(world: World) -> Iterator[str]:
    """S10."""
    for who, _, _, leaf in device_leaves(world):
        if isinstance(leaf, GmemLeaf):
            last = leaf.pfn + (1 << leaf.order)
            if not world.pool.allocated.contains_range(leaf.pfn, last):
                yield f"{who} maps free pfn {leaf.pfn}"


def unfit_leaves(world: World) -> Iterator[str]:
    """S13: a leaf lies in its area, has pages of one access, and agrees with the ownership tables page by page and size
    by size, if it is a trusted device's."""
    for who, ioas, domain, leaf in device_leaves(world):
        if isinstance(leaf, GmemLeaf) and leaf.rules is not None and domain.trusted and not leaf.rules.fits(leaf.block):
            yield f"leaf of order {leaf.order} of {who} is over entries of another size, or none"
        if isinstance(leaf, GmemLeaf) and leaf.order:
            shown = Range(leaf.first, PageIndex(leaf.first + (1 << leaf.order)))
            area = ioas.area_at(leaf.page)
            if area is None or not area.pages.covers(block(leaf.page, leaf.order)):
                yield f"leaf of order {leaf.order} of {who} does not fit its area"
            elif not leaf.inode.attributes.is_uniform(shown):
                yield f"leaf of order {leaf.order} of {who} spans both accesses"
