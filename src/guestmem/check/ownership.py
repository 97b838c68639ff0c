"""How the properties look at the architectures' tables: whose each page is, against the file that it is in."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from guestmem.arch import Lifetime, Owner
from guestmem.arch.snp import SnpPlatform
from guestmem.check.world import World, contexts, live_vms
from guestmem.kvm.identity import Identity, VirtualMachine
from guestmem.kvm.vm import Kvm
from guestmem.memory import Access, Inode, PageIndex, Pfn


def owned_pages(world: World) -> Iterator[tuple[Pfn, Owner]]:
    for platform in world.platforms.values():
        yield from platform.owned()


def wrong_owners(world: World) -> Iterator[str]:
    """S9: a page that is a guest's is private, in a file of that guest, and at the address of its binding; and no
    private leaf shows a page that is not its guest's. Pages that hardware would not give back are known to be bad."""
    places = _places(world)
    for pfn, owner in owned_pages(world):
        if pfn in world.pool.retired:
            continue
        place = places.get(pfn)
        if place is None:
            yield f"pfn {pfn} is {owner}'s and in no file"
            continue
        inode, index = place
        if index in inode.unmap_failed or inode.users.open:
            continue
        if inode.owner is None or inode.owner.identity != (owner.number, owner.generation):
            yield f"page {index:#x} of inode {inode.number} is {owner}'s and not its virtual machine's"
        elif inode.access_at(index) is not Access.PRIVATE:
            yield f"page {index:#x} of inode {inode.number} is shared and {owner}'s"
        elif not _is_bound(world, inode, index, owner):
            yield f"page {index:#x} of inode {inode.number} is {owner}'s, where no binding has it"
    yield from _leaves_of_others(world)


def _places(world: World) -> dict[Pfn, tuple[Inode, PageIndex]]:
    return {
        pfn: (inode, PageIndex(index))
        for inode in world.inodes
        if not inode.destroyed
        for index in inode.folios.present
        if (pfn := inode.folios.pfn(PageIndex(index))) is not None
    }


def _is_bound(world: World, inode: Inode, index: PageIndex, owner: Owner) -> bool:
    """Under the other policies an entry outlives its binding, and its address goes stale: that is what they do."""
    machine = inode.owner
    if owner.gfn is None or not isinstance(machine, VirtualMachine) or machine.lifetime is not Lifetime.BINDING:
        return True
    return owner.gfn in _frames(world, inode, index)


def _frames(world: World, inode: Inode, index: PageIndex) -> list[int]:
    """Where bindings have a page."""
    slots = ((context.binding_at(index), context) for context in contexts(world) if context.inode is inode)
    return [slot.gfns.start + index - slot.pages.start for slot, _ in slots if slot is not None]


def strayed(world: World) -> Iterator[str]:
    """S9 in its strict form, whatever the policy: how entries differ from the bindings of their pages."""
    places = _places(world)
    for pfn, owner in owned_pages(world):
        inode, index = places.get(pfn, (None, PageIndex(0)))
        if inode is None or inode.users.open or index in inode.unmap_failed or owner.gfn is None:
            continue
        frames = _frames(world, inode, index)
        if owner.gfn not in frames:
            yield "stale address" if frames else "not bound"


def _leaves_of_others(world: World) -> Iterator[str]:
    for kvm in live_vms(world):
        if not kvm.machine.architecture.has_tables:
            continue
        platform = kvm.environment.platforms[kvm.vm_type]
        for number, order, leaf in kvm.stage2.tables[Access.PRIVATE].leaves():
            for inside in range(1 << order):
                owner = platform.owner(Pfn(leaf.pfn + inside))
                if owner is None or owner[:2] != kvm.machine.identity:
                    yield f"vm {kvm.number} maps gfn {number + inside:#x}, whose page is {owner}'s"


def stale_state_pages(world: World) -> Iterator[str]:
    """S3 of the page that a vCPU's state is in: it has left the file only if the vCPU is out, and looks it up before it
    enters again. And no vCPU that was told to let go of its page is still on its way into the guest with it when
    the guest has taken it back (known bug B45)."""
    places = _places(world)
    for kvm in live_vms(world):
        pages = kvm.machine.architecture.state_pages
        for vcpu in kvm.vcpus.values() if pages is not None else ():
            mode = vcpu.guest_mode
            pfn = pages.page(mode.number) if pages is not None and mode is not None else None
            if pages is None or mode is None or pfn is None:
                continue
            gone = not _is_private_at(world, kvm, pfn, pages.gfn(mode.number), places.get(pfn))
            who = f"vCPU {vcpu.number} of vm {kvm.number}"
            if gone and (mode.entering or not mode.requested):
                yield f"{who} has its state in pfn {pfn}, which is its guest's page no more"
            elif mode.entering and mode.requested and not pages.is_good(mode.number):
                yield f"{who} enters with pfn {pfn}, which it was told to let go of"


def _is_private_at(world: World, kvm: Kvm, pfn: Pfn, gfn: int | None, place: tuple[Inode, PageIndex] | None) -> bool:
    if place is None or place[0].access_at(place[1]) is not Access.PRIVATE:
        return False
    owner = world.platforms[kvm.vm_type].owner(pfn)
    return owner is not None and owner[:2] == kvm.machine.identity and owner.gfn == gfn


def freed_but_owned(world: World) -> Iterator[str]:
    """S10: a page that reaches the allocator is the host's in every table."""
    for pfn, owner in owned_pages(world):
        if pfn not in world.pool.allocated:
            yield f"pfn {pfn} is free and {owner}'s"


def recycled_owners(world: World) -> Iterator[str]:
    """S8: no page names an identity that somebody else may have. A number that a bad page names is nobody's again."""
    vmsas = (platform.vmsas() for platform in world.platforms.values() if isinstance(platform, SnpPlatform))
    for pfn, owner in chain(owned_pages(world), *vmsas):
        if world.identities.may_come_again(Identity(owner.number, owner.generation)):
            yield f"pfn {pfn} is {owner}'s, whose number is free"
