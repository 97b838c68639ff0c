"""Conversions a second: 4K, 2M and 1G ranges, told to nobody, to one struct kvm, to eight.

The peer is the same change of a bare roaring bitmap: what storing the state costs by itself.
"""

from __future__ import annotations

import random

from pyroaring import BitMap64

from bench.harness import Row, Work, compare, report
from guestmem.host import Host
from guestmem.kvm.addresses import Gfn
from guestmem.kvm.context import KvmGmemContext
from guestmem.kvm.memslots import MemorySlot
from guestmem.memory import Abilities, Access, Inode, PageIndex, Range
from guestmem.uapi.kvm import KVM_MEM_GUEST_MEMFD, VmType

SIZE = 1 << 40
SIZES = {"4K": 1, "2M": 512, "1G": 1 << 18}


def run() -> None:
    rows: list[Row] = []
    for views in (0, 1, 8):
        with Host() as host:
            inode = _with_views(host, views)
            for name, pages in SIZES.items():
                title = f"{name}, {views or 'no'} struct kvm"
                rows.append(compare(title, _convert(host, inode, pages), _set_bits(pages), "conversion"))
    report("conversions (inode of 1 TiB, bound by each struct kvm, nothing mapped)", "bare bitmap", rows)
    report("conversions with the range mapped", "", [_mapped(SIZES[name], name) for name in ("4K", "2M")])


def _with_views(host: Host, views: int) -> Inode:
    """An inode of 1 TiB with `views` struct kvm as its users, each with a slot over all of it."""
    if not views:
        return host.new_inode(size=SIZE, abilities=Abilities(mmap=True, init_shared=True, convertible=True))
    vm = host.create_vm(VmType.SW_PROTECTED)
    gmem = vm.create_guest_memfd(SIZE, mmap=True, init_shared=True)
    context = gmem.file.private_data
    assert isinstance(context, KvmGmemContext)
    contexts = [context]
    for _ in range(views - 1):
        other = KvmGmemContext(host.create_vm(VmType.SW_PROTECTED).kvm, gmem.inode)
        other.file = gmem.file
        contexts.append(other)
    for each in contexts:
        slot = MemorySlot(0, KVM_MEM_GUEST_MEMFD, Range(Gfn(0), Gfn(SIZE >> 12)), 0)
        host.run(each.bind(slot, PageIndex(0)))
    return gmem.inode


def _ranges(pages: int) -> list[Range[PageIndex]]:
    """A thousand aligned ranges of the file."""
    rng = random.Random(1)
    starts = [rng.randrange((SIZE >> 12) // pages) * pages for _ in range(1000)]
    return [Range(PageIndex(start), PageIndex(start + pages)) for start in starts]


def _convert(host: Host, inode: Inode, pages: int) -> Work:
    """Each turn converts one range; to the other side every thousand, so that every turn changes something."""
    ranges = _ranges(pages)
    turn = 0

    def work(count: int) -> None:
        nonlocal turn
        for _ in range(count):
            chosen = ranges[turn % 1000]
            to = Access.SHARED if inode.access_at(chosen.start) is Access.PRIVATE else Access.PRIVATE
            host.run(inode.convert(chosen, to))
            turn += 1

    return work


def _set_bits(pages: int) -> Work:
    ranges = _ranges(pages)
    bits = BitMap64()
    turn = 0

    def work(count: int) -> None:
        nonlocal turn
        for _ in range(count):
            chosen = ranges[turn % 1000]
            if chosen.start in bits:
                bits.remove_range(chosen.start, chosen.end)
            else:
                bits.add_range(chosen.start, chosen.end)
            turn += 1

    return work


def _mapped(pages: int, name: str) -> Row:
    """Pre-fault the range, then convert it: what a guest that touches everything pays."""
    host = Host()
    vm = host.create_vm(VmType.SW_PROTECTED)
    gmem = vm.create_guest_memfd(4 << 20, mmap=True, init_shared=True)
    vm.set_memory_region(0, 0, 4 << 20, gmem=gmem)

    def work(count: int) -> None:
        for turn in range(count):
            vm.pre_fault(0, pages << 12)
            gmem.convert(0, pages << 12, Access.PRIVATE if turn % 2 == 0 else Access.SHARED)

    row = compare(f"{name}: map every page, then convert", work, unit="round")
    host.close()
    return row
