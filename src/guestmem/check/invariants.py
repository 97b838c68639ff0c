"""The safety properties, one function each, over a whole host; and how to have them checked after every step.

Each looks at the state as it is, from outside, with none of the product's shortcuts: where the provider finds a page by
its own table, a property walks the users' tables and asks whether the provider would agree. Two books of one fact.

Some properties hold at every step. Others only when nobody is in the middle of an operation; such a function says so
with `quiet`. Properties that no code touches yet are named in `NOT_YET`, with the reason, so that the list is whole.

S15 (a refusal changes nothing) needs a before and an after: `snapshot`. The second half of S12 ("zeroed once") needs a
memory: `ZeroGhost`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from itertools import chain, pairwise, product
from typing import NamedTuple

from guestmem.check import ownership
from guestmem.check.devices import exposed_pages, freed_pages, open_windows, stale_translations, unfit_leaves
from guestmem.check.huge_pages import broken_books, shared_huge_folios
from guestmem.check.world import (
    World,
    anonymous_folios,
    contexts,
    device_mappings,
    guest_mappings,
    host_mappings,
    live_vms,
    mappings,
    pinned,
    references,
)
from guestmem.iommu.context import IommuGmemContext
from guestmem.kvm.addresses import Gfn
from guestmem.kvm.context import KvmGmemContext
from guestmem.memory import PAGE_SHIFT, Access, PageIndex, Range
from guestmem.memory.notifier import BOTH
from guestmem.memory.pages import block
from guestmem.trace import Tracer
from guestmem.trace import events as event
from guestmem.uapi.kvm import KVM_MEM_GUEST_MEMFD, KVM_MEM_USERFAULT

NOT_YET = {
    "S11": "no direct map is modelled; the feature is only proposed",
}


class Violation(AssertionError):
    """A property does not hold. `name` is its number in spec/invariants.md, `facts` what broke it."""

    def __init__(self, name: str, facts: str) -> None:
        self.name = name
        self.facts = facts
        statement = PROPERTIES[name].statement if name in PROPERTIES else OTHERS.get(name, "")
        super().__init__(f"{name} {statement}: {facts}")


OTHERS = {
    "S15": "a refused call changes nothing",
    "MC": "the machine is not reset by a device",
    "L1": "a conversion makes progress",
    "L2": "a fault makes progress",
    "L3": "nothing is left at the end",
    "L4": "a memslot deletion makes progress",
    "L5": "there is no deadlock",
    "L6": "unregistering makes progress",
}
"""Statements of properties that are not a question about one state."""


class Property(NamedTuple):
    """A named, executable invariant. `broken` yields the facts of each way in which the world breaks it."""

    name: str
    statement: str
    broken: Callable[[World], Iterator[str]]


PROPERTIES: dict[str, Property] = {}


def _property(name: str, statement: str) -> Callable[[Callable[[World], Iterator[str]]], Callable[..., Iterator[str]]]:
    def register(broken: Callable[[World], Iterator[str]]) -> Callable[[World], Iterator[str]]:
        PROPERTIES[name] = Property(name, statement, broken)
        return broken

    return register


def check_all(world: World) -> None:
    """Raise Violation for the first property that does not hold."""
    for name, prop in PROPERTIES.items():
        for facts in prop.broken(world):
            raise Violation(name, facts)


def check_every_step(world: World) -> None:
    """From now on check all properties after every step that the world's scheduler makes."""
    world.scheduler.observers.append(lambda task: check_all(world))


# The properties


@_property("S1", "a private page is invisible to the host")
def _s1(world: World) -> Iterator[str]:
    reached = device_mappings(world, Access.SHARED)
    for mapping in chain(host_mappings(world), pinned(world), guest_mappings(world, Access.SHARED), reached):
        if mapping.inode is not None and mapping.inode.access_at(mapping.page) is Access.PRIVATE:
            yield f"{mapping} is private and {mapping.who} has it"
    for kvm in live_vms(world):
        if kvm.level.in_place:
            continue
        for number, order, _ in kvm.stage2.tables[Access.SHARED].leaves():
            if not kvm.attributes.is_all(block(Gfn(number), order), Access.SHARED):
                yield f"gfn {number:#x} of vm {kvm.number} is private by attribute and mapped shared"
    yield from exposed_pages(world)


@_property("S2", "a shared page is not privately mapped")
def _s2(world: World) -> Iterator[str]:
    for mapping in chain(guest_mappings(world, Access.PRIVATE), device_mappings(world, Access.PRIVATE)):
        if mapping.inode is not None and mapping.inode.access_at(mapping.page) is Access.SHARED:
            yield f"{mapping} is shared and {mapping.who} maps it private"


@_property("S3", "no mapping outlives the page it was looked up for")
def _s3(world: World) -> Iterator[str]:
    for mapping in mappings(world):
        if mapping.inode is None or mapping.inode.folios.pfn(mapping.page) != mapping.pfn:
            yield f"{mapping.who} maps pfn {mapping.pfn} for {mapping}, which the file has no more"
    for kvm in live_vms(world):
        for vcpu in kvm.vcpus.values():
            for (frame, private), cached in getattr(vcpu.engine, "tlb", {}).items():
                current = kvm.stage2.translate(frame << PAGE_SHIFT, False, private)
                if current is None or current.hva != cached.hva:
                    yield f"vCPU {vcpu.number} of vm {kvm.number} caches gfn {frame:#x}, stage 2 no longer has it"
    yield from stale_translations(world)
    yield from ownership.stale_state_pages(world)


@_property("S4", "windows are closed as often as they are opened")
def _s4(world: World) -> Iterator[str]:
    if any(inode.users.open for inode in world.inodes):
        return
    for kvm in live_vms(world):
        if kvm.slots_lock.owner is None and not kvm.host_invalidations and kvm.stage2.window.open:
            yield f"{kvm.stage2.window.open} windows of vm {kvm.number} are open and nobody is invalidating"
    yield from open_windows(world)


@_property("S5", "bindings and memslots agree")
def _s5(world: World) -> Iterator[str]:
    for context in contexts(world):
        pages = sorted(slot.pages for slot in context.bindings)
        for before, after in pairwise(pages):
            if before.end > after.start:
                yield f"pages {before} and {after} of inode {context.inode.number} are bound twice"
        for slot in context.bindings:
            if slot.context is not context:
                yield f"{slot} is bound to inode {context.inode.number} and does not know it"
            if not context.kvm.level.signed_range_end and slot.pages.end > context.inode.pages:
                yield f"{slot} is bound beyond the end of inode {context.inode.number}"
    for kvm in live_vms(world):
        for slot in kvm.memslots.by_gfn:
            if slot.context is not None and slot not in slot.context.bindings:
                yield f"{slot} of vm {kvm.number} is not among the bindings of its file"


@_property("S6", "nothing points to a freed slot or a released file")
def _s6(world: World) -> Iterator[str]:
    for context in contexts(world):
        for slot in context.bindings:
            if slot.freed:
                yield f"{slot} is freed and bound to inode {context.inode.number}"
    for kvm in live_vms(world):
        for slot in kvm.memslots.by_gfn:
            if slot.freed:
                yield f"{slot} is freed and in the table of vm {kvm.number}"
            if slot.file is not None and slot.file.released:
                yield f"{slot} of vm {kvm.number} points to a released file"


@_property("S7", "memory is mapped by its own virtual machine alone")
def _s7(world: World) -> Iterator[str]:
    """A view may be of another one: of a destination before a migration, of the source after it. It maps nothing."""
    for context in contexts(world):
        kvm, owner = context.kvm, context.inode.owner
        if owner is not None and kvm.machine.identity == owner.identity:
            continue
        for access, slot in product(BOTH, context.bindings):
            if slot.gmem_only or access is Access.PRIVATE:
                for number, _, _ in kvm.stage2.tables[access].leaves():
                    if slot.gfns.contains(Gfn(number)):
                        whose = owner.identity if owner is not None else None
                        yield (
                            f"vm {kvm.number}, of {kvm.machine.identity}, maps gfn {number:#x} "
                            f"from inode {context.inode.number} of {whose}"
                        )


@_property("S8", "an identity in use is alive")
def _s8(world: World) -> Iterator[str]:
    for kvm in live_vms(world):
        identity = kvm.machine.identity
        if world.identities.live.get(identity.number) != identity:
            yield f"vm {kvm.number} uses {identity}, which is recycled"
        owner = kvm.mirror_of
        if owner is not None and (owner.destroyed or owner.machine.identity != identity):
            yield f"vm {kvm.number} is a helper under {identity}, which vm {owner.number} has no more"
    for inode in world.inodes:
        if inode.destroyed or inode.owner is None:
            continue
        if inode.owner.identity not in world.identities.live.values():
            yield f"inode {inode.number} belongs to {inode.owner.identity}, which is recycled"
    yield from ownership.recycled_owners(world)


@_property("S9", "a page is its guest's alone, where its binding has it")
def _s9(world: World) -> Iterator[str]:
    yield from ownership.wrong_owners(world)


@_property("S10", "a free page is nobody's")
def _s10(world: World) -> Iterator[str]:
    allocated = world.pool.allocated
    for process in world.userspace.processes:
        for vpn, _, pte in process.mm.page_table.leaves():
            if pte.pfn not in allocated:
                yield f"mm {process.mm.number} maps free pfn {pte.pfn} at {vpn << 12:#x}"
    for kvm in live_vms(world):
        for access in BOTH:
            for _, order, leaf in kvm.stage2.tables[access].leaves():
                if not allocated.contains_range(leaf.pfn, leaf.pfn + (1 << order)):
                    yield f"vm {kvm.number} maps free pfn {leaf.pfn} at gfn {leaf.gfn:#x}"
    yield from freed_pages(world)
    yield from ownership.freed_but_owned(world)
    for who, reference in references(world):
        if reference.pfn not in allocated:
            yield f"{who} is on free pfn {reference.pfn}"


@_property("S12", "a mapped page was zeroed or written, never stale")
def _s12(world: World) -> Iterator[str]:
    for mapping in mappings(world):
        if mapping.inode is not None and mapping.page not in mapping.inode.folios.uptodate:
            yield f"{mapping.who} maps {mapping}, which is not up to date"


@_property("S13", "no leaf spans pages of different access, or more than its folio and slot")
def _s13(world: World) -> Iterator[str]:
    for kvm in live_vms(world):
        for access in BOTH:
            for number, order, leaf in kvm.stage2.tables[access].leaves():
                slot = kvm.memslots.find(leaf.gfn)
                if slot is None or slot.context is None or not order:
                    continue
                gfns = block(leaf.gfn, order)
                pages = Range(slot.index_of(gfns.start), PageIndex(slot.index_of(gfns.start) + gfns.pages))
                if not slot.gfns.covers(gfns) or pages.start % gfns.pages or order > slot.context.inode.order:
                    yield f"leaf of order {order} at gfn {number:#x} of vm {kvm.number} does not fit {slot}"
                elif not slot.context.inode.attributes.is_uniform(pages):
                    yield f"leaf of order {order} at gfn {number:#x} of vm {kvm.number} spans both accesses"
    yield from shared_huge_folios(world)
    yield from unfit_leaves(world)


@_property("S14", "references and pages are all accounted for")
def _s14(world: World) -> Iterator[str]:
    if not quiet(world):
        return
    held = Counter((pin.inode.number, pin.inode.folios.head(pin.page)) for pin in pinned(world) if pin.inode)
    for inode in world.inodes:
        for head, count in inode.folios.references.items():
            if held.pop((inode.number, head), 0) != count:
                yield f"page {head:#x} of inode {inode.number} has {count} references that are not all held by pins"
    if held:
        yield f"pins hold references that no folio counts: {dict(held)}"
    pages = sum(len(inode.folios.present) for inode in world.inodes if not inode.destroyed)
    pages += sum(len(folios.present) for folios in anonymous_folios(world))
    pages += world.pool.detached_pages()
    if pages + len(world.pool.retired) != len(world.pool.allocated):
        yield f"{len(world.pool.allocated)} pages are allocated, {pages} have an owner"
    yield from broken_books(world)


@_property("S16", "what a slot or page is allowed to be was checked")
def _s16(world: World) -> Iterator[str]:
    for kvm in live_vms(world):
        for slot in kvm.memslots.by_gfn:
            if slot.has_gmem and slot.flags & ~KVM_MEM_USERFAULT != KVM_MEM_GUEST_MEMFD:
                yield f"{slot} of vm {kvm.number} has flags {slot.flags:#x} beside guest_memfd"
    for inode in world.inodes:
        if inode.folios.present and inode.folios.present.max() >= inode.pages:
            yield f"inode {inode.number} has a page beyond its end"


@_property("S17", "locks are held in order")
def _s17(world: World) -> Iterator[str]:
    for task in world.scheduler.parked:
        classes = [lock.lock_class for lock in task.held]
        if classes != sorted(set(classes)):
            yield f"task {task.name} holds {', '.join(lock.name for lock in task.held)}"


@_property("S18", "launch and migration find no vCPU half made, or loaded")
def _s18(world: World) -> Iterator[str]:
    for kvm in live_vms(world):
        for vcpu in kvm.vcpus.values():
            if kvm.finishing is not None and vcpu.mutex.owner not in (None, kvm.finishing):
                yield f"vCPU {vcpu.number} of vm {kvm.number} is loaded while the launch reads its state"
            if kvm.has_private_memory and vcpu.identity != kvm.machine.identity:
                yield f"vCPU {vcpu.number} of vm {kvm.number} was made for {vcpu.identity}, not {kvm.machine.identity}"


@_property("S19", "a bad page is nobody's any more")
def _s19(world: World) -> Iterator[str]:
    for mapping in mappings(world):
        inode, index = mapping.inode, mapping.page
        if inode is None or inode.users.open or index not in inode.folios.poisoned:
            continue
        if index not in inode.unmap_failed:  # that one is known to be mapped, and why it is bad
            yield f"{mapping} is poisoned and {mapping.who} maps it"


@_property("S20", "nobody is told after it has left")
def _s20(world: World) -> Iterator[str]:
    for inode in world.inodes:
        for telling in inode.users.open:
            for registration in telling.told:
                user = registration.user
                if isinstance(user, KvmGmemContext) and user.file.released:
                    yield f"a released view of inode {inode.number} is being told"
                if isinstance(user, IommuGmemContext) and user.closed:
                    yield f"an address space that shows inode {inode.number} no more is being told"


# S12, second half; S15


class ZeroGhost:
    """Remembers which pages were zeroed in their present life in the file: it must happen once (S12)."""

    def __init__(self, tracer: Tracer) -> None:
        self._zeroed: set[tuple[int, int]] = set()
        self.stop = tracer.listen(self._see)

    def _see(self, seen: event.Event) -> None:
        if isinstance(seen, event.GmemFolioZero):
            for index in range(seen.start, seen.end):
                if (seen.inode, index) in self._zeroed:
                    raise Violation("S12", f"page {index:#x} of inode {seen.inode} is zeroed a second time")
                self._zeroed.add((seen.inode, index))
        elif isinstance(seen, event.GmemFolioFree):
            self._zeroed = {
                (inode, index)
                for inode, index in self._zeroed
                if inode != seen.inode or not seen.start <= index < seen.end
            }


def snapshot(world: World) -> Hashable:
    """What a refused operation must leave as it was (S15): access, pages present, their folios, bindings, slots and
    references.

    Mappings are not part of it: they may go at any time, and come back by a fault.
    """
    inodes = tuple(
        (
            inode.number,
            tuple(
                (run.start, run.end, access) for run, access in inode.runs(Range(PageIndex(0), PageIndex(inode.pages)))
            ),
            tuple(inode.folios.present),
            tuple(sorted(inode.folios.references.items())),
            tuple((order, tuple(blocks)) for order, blocks in inode.folios.splits.split.items()),
        )
        for inode in world.inodes
        if not inode.destroyed
    )
    vms = tuple(
        (
            kvm.number,
            tuple((slot.id, slot.gfns, slot.flags, slot.pages, id(slot.context)) for slot in kvm.memslots.by_gfn),
        )
        for kvm in live_vms(world)
    )
    return inodes, vms


def quiet(world: World) -> bool:
    """Whether no task is in the middle of anything: none holds a lock."""
    return not any(task.held for task in world.scheduler.parked)
