"""When two states of a machine count as one: the rules by which the explorer's fingerprints are canonical.

Three kinds of rule, each sound for a reason that a test holds against the source (tests/check/test_canonical.py):

- *Renaming.* A page number is identity only, so numbers are renamed in the order in which the walk meets them; a free
  page that nobody mentions is like one that was never used. Sequence numbers, grace periods and wake-ups are only ever
  compared with an earlier value of themselves: what counts is whether that value is still the present one.
- *Left out: machinery and constants*, which are set when an object is made and never again.
- *Left out: statistics*, which nobody but a reader outside looks at.

Everything else that can be reached is state. A field that is forgotten here costs executions, not soundness.
"""

from __future__ import annotations

from typing import Any

from guestmem.arch.cca import CcaGuest
from guestmem.arch.pkvm import PkvmGuest
from guestmem.arch.snp import SnpGuest, SnpPlatform
from guestmem.arch.snp.firmware import Firmware
from guestmem.arch.snp.rmp import Rmp
from guestmem.arch.snp.vcpus import SnpVcpus, Vmsa
from guestmem.arch.sw import SoftwareGuest
from guestmem.arch.tdx import TdxGuest
from guestmem.check.arena import ARENA_SIZE
from guestmem.check.invariants import snapshot
from guestmem.cpu.engine import Translation
from guestmem.cpu.scripted import ScriptedEngine
from guestmem.iommu import DmaDevice, Domain, Ioas, Iommu
from guestmem.iommu.areas import PinnedPages
from guestmem.iommu.context import IommuGmemContext
from guestmem.iommu.leaves import GmemLeaf, Iotlb
from guestmem.kvm.context import KvmGmemContext
from guestmem.kvm.identity import IdentityPool, VirtualMachine
from guestmem.kvm.stage2 import Leaf, Stage2
from guestmem.kvm.vcpu import Vcpu
from guestmem.kvm.vm import Kvm
from guestmem.memory import File, FolioReference, Folios, HugePool, Hugetlb, Inode, Page, Pool, Range, Subpool, Vmemmap
from guestmem.memory.folio import PfnMap
from guestmem.memory.notifier import Registration, Telling, Users
from guestmem.memory.pool import Detached, Unit
from guestmem.memory.splits import Splits
from guestmem.sched import Fingerprinter, Lock, RefCount, Rules, RwLock, SeqCount, Srcu, WaitQueue, Walk
from guestmem.userspace import AddressSpace, Pin, Userspace
from guestmem.userspace.anonymous import AnonymousMemory
from guestmem.userspace.area import Pte

CONSTANTS: dict[type, frozenset[str]] = {
    AddressSpace: frozenset({"_scheduler", "_tracer"}),
    AnonymousMemory: frozenset({"_new_backing", "_pool", "_scheduler", "pages"}),
    CcaGuest: frozenset({"dma"}),
    DmaDevice: frozenset({"_scheduler", "_tracer", "page_requests"}),
    Domain: frozenset({"_orders", "_scheduler", "_tracer", "access"}),
    Firmware: frozenset({"_fails", "_limit", "_rmp"}),
    File: frozenset({"_release", "_release_takes", "_scheduler"}),
    Folios: frozenset({"_name", "_scheduler", "order", "source"}),
    HugePool: frozenset({"order", "pool", "vmemmap"}),
    Hugetlb: frozenset({"_pool"}),
    Inode: frozenset({"abilities", "backing", "order", "orders", "pages", "policy", "scheduler", "source", "tracer"}),
    Ioas: frozenset({"orders", "rules_of", "scheduler", "tracer"}),
    Iommu: frozenset({"orders", "rules_of", "scheduler", "tracer"}),
    IommuGmemContext: frozenset({"rules"}),
    Kvm: frozenset({"environment", "has_private_memory", "level", "scheduler", "tracer", "vm_type"}),
    KvmGmemContext: frozenset(),
    Lock: frozenset({"_acquire", "_scheduler", "lock_class", "name"}),
    Pin: frozenset({"_pins", "_tracer"}),
    PinnedPages: frozenset({"_pin_one", "writable"}),
    PkvmGuest: frozenset({"dma"}),
    RefCount: frozenset({"_scheduler", "name"}),
    Registration: frozenset({"_users"}),
    Rmp: frozenset({"_fails", "_pages", "large_order"}),
    RwLock: frozenset({"_scheduler", "exclusive", "lock_class", "name", "shared"}),
    SnpGuest: frozenset({"_key", "dma"}),
    SnpPlatform: frozenset({"guests_validate"}),
    SnpVcpus: frozenset({"_asid", "_firmware", "_own_pages", "_rmp"}),
    SoftwareGuest: frozenset({"has_tables"}),
    Splits: frozenset({"_parts", "orders", "whole"}),
    ScriptedEngine: frozenset({"_memory", "script"}),
    Stage2: frozenset({"_flush", "_tracer", "_vm", "check_access", "page_bit"}),
    Subpool: frozenset({"huge", "pool"}),
    TdxGuest: frozenset({"dma"}),
    Unit: frozenset({"source"}),
    Userspace: frozenset({"new_backing", "pool", "scheduler", "tracer"}),
    Users: frozenset({"_inode", "_tracer", "_unmap_failed"}),
    VirtualMachine: frozenset({"_pool", "lifetime"}),
    Vmemmap: frozenset({"_pool"}),
}
"""Set by `__init__` alone, and the same in every execution of a scenario for the object that has them."""

STATISTICS: dict[type, frozenset[str]] = {
    DmaDevice: frozenset({"_bytes_read", "_bytes_written", "_fault_counts"}),
    Domain: frozenset({"_hits", "_walks"}),
    Inode: frozenset({"_faults", "_merges", "_splits", "conversions"}),
    Users: frozenset({"invalidations"}),
    Vcpu: frozenset({"exits"}),
}
"""Counted, and read by `statistics()` or by nobody."""

DERIVED: dict[type, frozenset[str]] = {
    Kvm: frozenset(  # what only a served guest or its VMM can tell
        {"default_tsc_khz", "exception_payload", "max_vcpu_ids", "msr_filter", "triple_fault_event", "user_space_msrs"}
    ),
    Lock: frozenset({"owner"}),  # a lock is among what its holder holds
    RwLock: frozenset({"_waiting_writers"}),  # asked under fifo only
    ScriptedEngine: frozenset({"_regs", "_sregs"}),  # a script does not use them
    Telling: frozenset({"_section"}),  # its reader is listed by the Srcu
    Vcpu: frozenset({"machine_check", "msr_stops", "triple_fault"}),
    Vmemmap: frozenset({"optimised", "restored"}),  # counted, and read for the text of the counters
}
"""Said elsewhere, or without effect on an explored machine."""

LEFT_OUT = {
    kind: CONSTANTS.get(kind, frozenset()) | STATISTICS.get(kind, frozenset()) | DERIVED.get(kind, frozenset())
    for kind in CONSTANTS.keys() | STATISTICS.keys() | DERIVED.keys()
}


# Page numbers


def _rename(walk: Walk, pfn: int) -> None:
    numbers = walk.numbers
    walk.out.append(numbers.setdefault(pfn, len(numbers)))


def _rename_all(walk: Walk, value: Any) -> None:
    """Page numbers in any shape in which a local variable holds them."""
    if isinstance(value, Range):
        for pfn in range(value.start, value.end):
            _rename(walk, pfn)
        walk.out.append(None)
    elif isinstance(value, list):
        for item in value:
            _rename_all(walk, item)
        walk.out.append(None)
    elif isinstance(value, int):
        _rename(walk, value)
    else:
        walk.value(value)


def _pte(walk: Walk, pte: Pte) -> None:
    walk.out += (pte.writable, pte.page_index)
    _rename(walk, pte.pfn)
    walk.value(pte.folios)


def _leaf(walk: Walk, leaf: Leaf) -> None:
    walk.out += (leaf.gfn, leaf.order, leaf.writable)
    for inside in range(1 << leaf.order):
        _rename(walk, leaf.pfn + inside)


def _vmsa(walk: Walk, vmsa: Vmsa) -> None:
    walk.out.append(vmsa.gfn)
    _rename(walk, vmsa.pfn)


def _gmem_leaf(walk: Walk, leaf: GmemLeaf) -> None:
    walk.out += (leaf.page, leaf.order, leaf.readable, leaf.writable, leaf.inode.number, leaf.first)
    for inside in range(1 << leaf.order):
        _rename(walk, leaf.pfn + inside)


def _iotlb(walk: Walk, iotlb: Iotlb) -> None:
    """In the order of pages: nothing is dropped for want of room in a machine this small."""
    for leaf in sorted(iotlb.leaves(), key=lambda leaf: leaf.page):
        walk.value(leaf)
    walk.out.append(None)


def _page(walk: Walk, page: Page) -> None:
    walk.out.append(page.order)
    _rename(walk, page.pfn)


def _pfn_map(walk: Walk, numbers: PfnMap) -> None:
    for number, chunk in sorted(numbers._chunks.items()):
        walk.out.append(number)
        if isinstance(chunk, int):
            _rename(walk, chunk)
            continue
        for place in sorted(chunk):
            walk.out.append(place)
            _rename(walk, chunk[place])


def _reference(walk: Walk, reference: FolioReference) -> None:
    if walk.met(reference):
        return
    walk.out += (reference.index, reference.head, reference._put)
    _rename(walk, reference.pfn)
    walk.value(reference.folios)


def _detached(walk: Walk, folio: Detached) -> None:
    walk.out += (folio.references, folio._bytes.raw.rstrip(b"\0"))
    _rename_all(walk, folio.pfns)
    if walk.met(folio.unit):
        return
    walk.out += (folio.unit.held, folio.unit.vmemmap)
    _rename_all(walk, folio.unit.pfns)
    walk.value(folio.unit.source if isinstance(folio.unit.source, Subpool) else None)


def _pool(walk: Walk, pool: Pool) -> None:
    """Last of the roots: which of the pages that somebody mentions are free, and in which order they would come back.

    Below the last of those the free pages are as good as pages that were never used.
    """
    out = walk.out
    out += (len(pool.allocated), pool.available)
    for pfn in sorted(pool.detached, key=lambda pfn: walk.numbers.get(pfn, -1)):
        _rename(walk, pfn)
        walk.value(pool.detached[pfn])
    out.append(sorted(walk.numbers.get(pfn, -1) for pfn in pool.retired))
    order = [walk.numbers.get(pfn, -1) for free in reversed(pool._free) for pfn in range(free.start, free.end)]
    while order and order[-1] < 0:
        order.pop()
    out.append(order)


# Counters that are compared with an earlier value of themselves


def _identity_only(walk: Walk, value: object) -> None:
    walk.met(value)


def _srcu(walk: Walk, srcu: Srcu) -> None:
    if not walk.met(srcu):
        for epoch, task in srcu.readers:
            walk.out.append(epoch - srcu.epoch)
            walk.value(task)
        walk.out.append(None)


def _identities(walk: Walk, pool: IdentityPool) -> None:
    walk.value(pool.live)
    walk.out.append(hash(tuple(pool._free)))


def _translation(walk: Walk, translation: Translation) -> None:
    """Where a TLB entry leads is state; in an arena addresses are the same in every execution."""
    walk.out += (translation.hva % ARENA_SIZE, translation.writable)


def _page_fault(variables: dict[str, Any]) -> dict[str, Any]:
    if "seen" in variables:
        variables["seen"] = not variables["kvm"].stage2.window.sequence.moved_since(variables["seen"])
    return variables


def _map_page(variables: dict[str, Any]) -> dict[str, Any]:
    if "seen" in variables:
        variables["seen"] = not variables["domain"].window.sequence.moved_since(variables["seen"])
    return variables


def _synchronize(variables: dict[str, Any]) -> dict[str, Any]:
    if "before" in variables:
        variables["before"] -= variables["self"].epoch
    return variables


def _wait_until(variables: dict[str, Any]) -> dict[str, Any]:
    if "seen" in variables:
        variables["seen"] = variables["seen"] == variables["self"]._wakeups
    return variables


def _act(variables: dict[str, Any]) -> dict[str, Any]:
    """How far an actor has come is said by its answers."""
    return {}


def _guarded(variables: dict[str, Any]) -> dict[str, Any]:
    """What S15 will ask: whether this call alone has changed something."""
    if "before" not in variables:
        return {}
    machine = variables["self"]
    turns = sum(task.turns for task in machine.tasks) - variables["mine"].turns
    alone = variables["others"] == turns
    return {"alone": alone, "changed": alone and variables["before"] != snapshot(machine)}


FRAMES = {
    "Machine._act": _act,
    "_answer": _act,
    "Machine._guarded": _guarded,
    "IommuGmemContext.map_page": _map_page,
    "page_fault": _page_fault,
    "_look_up": _page_fault,
    "Srcu.synchronize": _synchronize,
    "WaitQueue.wait_until": _wait_until,
}
"""The functions that keep an earlier value of a counter, or of the state, across an await."""

PFN_LOCALS = ("head_pfn", "pfn", "pfns")
"""The names under which functions keep page numbers across an await."""


def rules() -> Rules:
    """What a `Fingerprinter` needs to walk a machine."""
    return Rules(
        describe={
            Pte: _pte,
            Leaf: _leaf,
            GmemLeaf: _gmem_leaf,
            Vmsa: _vmsa,
            Iotlb: _iotlb,
            Page: _page,
            PfnMap: _pfn_map,
            FolioReference: _reference,
            Detached: _detached,
            Pool: _pool,
            SeqCount: _identity_only,
            WaitQueue: _identity_only,
            Srcu: _srcu,
            IdentityPool: _identities,
            Translation: _translation,
        },
        left_out=LEFT_OUT,
        locals=dict.fromkeys(PFN_LOCALS, _rename_all),
        frames=FRAMES,
    )


FINGERPRINT = Fingerprinter(rules())
