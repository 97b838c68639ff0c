"""How the properties look at the world: from outside, by walking what each user has mapped or holds."""

from __future__ import annotations

import collections.abc
from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple, Protocol

from guestmem.arch import Platform
from guestmem.iommu import Domain, Ioas, Iommu
from guestmem.iommu.areas import PinnedArea
from guestmem.iommu.leaves import GmemLeaf, IoLeaf
from guestmem.kvm.addresses import Gfn
from guestmem.kvm.context import KvmGmemContext
from guestmem.kvm.identity import IdentityPool
from guestmem.kvm.vm import Kvm
from guestmem.memory import Access, FolioReference, Folios, Hugetlb, Inode, PageIndex, Pfn, Pool
from guestmem.memory.notifier import BOTH
from guestmem.sched import Scheduler
from guestmem.trace import Tracer
from guestmem.uapi.kvm import VmType
from guestmem.userspace import Userspace
from guestmem.userspace.addresses import Vpn
from guestmem.userspace.anonymous import AnonymousMemory
from guestmem.userspace.gmem_mapping import GmemSource


class World(Protocol):
    """What the properties look at; a Host is one."""

    scheduler: Scheduler
    tracer: Tracer
    pool: Pool
    hugetlb: Hugetlb
    identities: IdentityPool
    userspace: Userspace
    inodes: list[Inode]
    vms: list[Kvm]
    iommu: Iommu
    platforms: collections.abc.Mapping[VmType, Platform]


def live_vms(world: World) -> Iterator[Kvm]:
    return (kvm for kvm in world.vms if not kvm.destroyed)


def contexts(world: World) -> Iterator[KvmGmemContext]:
    for inode in world.inodes:
        for registration in inode.users.registrations:
            if isinstance(registration.user, KvmGmemContext):
                yield registration.user


class Mapping(NamedTuple):
    """Somebody's entry for, or hold on, a page of a guest_memfd. `inode` is None if the slot lost its file."""

    who: str
    inode: Inode | None
    page: PageIndex
    pfn: Pfn

    def __str__(self) -> str:
        return f"page {self.page:#x} of inode {self.inode.number if self.inode else '(gone)'}"


def mappings(world: World) -> Iterator[Mapping]:
    """Every entry of every user, of either access."""
    guests = (guest_mappings(world, access) for access in BOTH)
    return chain(host_mappings(world), *guests, *(device_mappings(world, access) for access in BOTH))


def host_mappings(world: World) -> Iterator[Mapping]:
    for process in world.userspace.processes:
        for vpn, _, pte in process.mm.page_table.leaves():
            area = process.mm.area_at(Vpn(vpn))
            if area is not None and isinstance(area.source, GmemSource):
                yield Mapping(f"mm {process.mm.number}", area.source.file.inode, pte.page_index, pte.pfn)


def references(world: World) -> Iterator[tuple[str, FolioReference]]:
    """Every reference that somebody holds: pins of processes, and those of an IOMMU."""
    for pin in world.userspace.pins:
        for reference in pin.references:
            yield f"a pin of mm {pin.mm.number}", reference
    seen: set[int] = set()
    for ioas in world.iommu.ioases:
        for area in ioas.areas:
            if isinstance(area, PinnedArea) and id(area.source) not in seen:
                seen.add(id(area.source))
                for held in area.source.held.values():
                    if isinstance(held, FolioReference):
                        yield f"a pin of ioas {ioas.number}", held


def pinned(world: World) -> Iterator[Mapping]:
    """Every pinned page that is still in its guest_memfd."""
    inodes = {inode.folios: inode for inode in world.inodes}
    for who, reference in references(world):
        inode = inodes.get(reference.folios)
        if inode is not None and inode.folios.pfn(reference.index) == reference.pfn:
            yield Mapping(who, inode, reference.index, reference.pfn)


def guest_mappings(world: World, access: Access) -> Iterator[Mapping]:
    """Every frame that a stage 2 maps from a guest_memfd with `access`."""
    for kvm in live_vms(world):
        for _, order, leaf in kvm.stage2.tables[access].leaves():
            slot = kvm.memslots.find(leaf.gfn)
            if slot is None or not (slot.gmem_only or access is Access.PRIVATE):
                continue
            inode = slot.context.inode if slot.context else None
            for inside in range(1 << order):
                gfn = Gfn(leaf.gfn + inside)
                yield Mapping(f"vm {kvm.number} gfn {gfn:#x}", inode, slot.index_of(gfn), Pfn(leaf.pfn + inside))


def domains(world: World) -> Iterator[tuple[Ioas, Domain]]:
    for ioas in world.iommu.ioases:
        for domain in ioas.domains:
            yield ioas, domain


def device_leaves(world: World) -> Iterator[tuple[str, Ioas, Domain, IoLeaf]]:
    """Every leaf that a device's access may go through: of an IO page table, or cached in an IOTLB."""
    for ioas, domain in domains(world):
        for _, _, leaf in domain.table.leaves():
            yield f"domain {domain.number} at {leaf.page << 12:#x}", ioas, domain, leaf
        for leaf in domain.iotlb.leaves():
            yield f"IOTLB of domain {domain.number} at {leaf.page << 12:#x}", ioas, domain, leaf


def device_mappings(world: World, access: Access) -> Iterator[Mapping]:
    """Every page that a domain of this access maps, or its IOTLB has, from a guest_memfd."""
    for who, _, domain, leaf in device_leaves(world):
        if domain.access is access and isinstance(leaf, GmemLeaf):
            for inside in range(1 << leaf.order):
                yield Mapping(who, leaf.inode, PageIndex(leaf.first + inside), Pfn(leaf.pfn + inside))


def anonymous_folios(world: World) -> set[Folios]:
    return {
        area.source.folios
        for process in world.userspace.processes
        for area in process.mm.areas
        if isinstance(area.source, AnonymousMemory)
    }
