"""The event schema: every state change of guestmem is one of these.

Events carry plain integers and strings, so that a reader (the page, Perfetto, a test, a log) needs nothing else of
guestmem. Pages are file indices, frames are guest frame numbers, ranges are half open. Kernel tracepoint names are kept
where the kernel has one (kvm_exit, kvm_page_fault, ...); ours begin with gmem_ or user_.
"""

from __future__ import annotations

import msgspec


class Event(msgspec.Struct, frozen=True, gc=False, tag_field="event", tag=str.lower):
    """Base of all events. The tag is the name under which it is written and read."""


# Provider. `inode` is the inode number.


class GmemCreate(Event, frozen=True, tag="gmem_create"):
    inode: int
    size: int
    flags: int


class GmemDestroy(Event, frozen=True, tag="gmem_destroy"):
    inode: int


class GmemFault(Event, frozen=True, tag="gmem_fault"):
    """A user got a page. `user` is the kind of the registered user, `access` shared or private."""

    inode: int
    index: int
    user: str
    access: str
    pfn: int
    order: int


class GmemFolioAlloc(Event, frozen=True, tag="gmem_folio_alloc"):
    """Pages `start`..`end` came into the file, not yet zeroed."""

    inode: int
    start: int
    end: int


class GmemFolioZero(Event, frozen=True, tag="gmem_folio_zero"):
    """Pages `start`..`end` were zeroed for the first time since they came into the file."""

    inode: int
    start: int
    end: int


class GmemZeroRange(Event, frozen=True, tag="gmem_zero_range"):
    """A hole in a part of a huge page: pages `start`..`end` stay, their bytes are gone."""

    inode: int
    start: int
    end: int


class GmemSplit(Event, frozen=True, tag="gmem_split"):
    """`folios` folios of `order` between pages `start` and `end` were split into the next smaller ones."""

    inode: int
    start: int
    end: int
    order: int
    folios: int


class GmemMerge(Event, frozen=True, tag="gmem_merge"):
    """`folios` folios of `order` between pages `start` and `end` were made of smaller ones."""

    inode: int
    start: int
    end: int
    order: int
    folios: int


class GmemFolioFree(Event, frozen=True, tag="gmem_folio_free"):
    """Pages `start`..`end` left the file. `detached` of them live on with a holder of references."""

    inode: int
    start: int
    end: int
    detached: int


class GmemConvert(Event, frozen=True, tag="gmem_convert"):
    inode: int
    start: int
    end: int
    to: str


class GmemInvalidateBegin(Event, frozen=True, tag="gmem_invalidate_begin"):
    inode: int
    start: int
    end: int
    reason: str
    access: str
    user: str


class GmemInvalidateEnd(Event, frozen=True, tag="gmem_invalidate_end"):
    inode: int
    start: int
    end: int
    reason: str
    access: str
    user: str


class GmemPoison(Event, frozen=True, tag="gmem_poison"):
    inode: int
    index: int


# KVM. `vm` is the number of the struct kvm.


class KvmBind(Event, frozen=True, tag="kvm_gmem_bind"):
    vm: int
    slot: int
    inode: int
    start: int
    end: int
    gfn: int


class KvmUnbind(Event, frozen=True, tag="kvm_gmem_unbind"):
    vm: int
    slot: int
    inode: int
    start: int
    end: int


class KvmGmemLink(Event, frozen=True, tag="kvm_gmem_link"):
    """`vm` has a view of an inode through a file of the struct kvm `source`."""

    vm: int
    source: int
    inode: int


class KvmMoveEncContext(Event, frozen=True, tag="kvm_move_enc_context"):
    """`vm` has taken the identity of `source`, which is dead."""

    vm: int
    source: int
    number: int
    generation: int


class KvmCopyEncContext(Event, frozen=True, tag="kvm_copy_enc_context"):
    """`vm` is a helper of `source` and has its identity."""

    vm: int
    source: int
    number: int
    generation: int


class KvmPageFault(Event, frozen=True, tag="kvm_page_fault"):
    """A guest access that missed stage 2. `result` is mapped, exit, retry or mmio."""

    vm: int
    vcpu: int
    gpa: int
    access: str
    write: bool
    result: str


class KvmMap(Event, frozen=True, tag="kvm_map"):
    """A stage-2 leaf was installed."""

    vm: int
    gfn: int
    order: int
    access: str
    pfn: int


class KvmUnmap(Event, frozen=True, tag="kvm_unmap"):
    """`leaves` stage-2 leaves between the frames `start` and `end` were zapped."""

    vm: int
    start: int
    end: int
    access: str
    leaves: int


class KvmExit(Event, frozen=True, tag="kvm_exit"):
    vm: int
    vcpu: int
    reason: str


class KvmHypercall(Event, frozen=True, tag="kvm_hypercall"):
    vm: int
    vcpu: int
    nr: int
    a0: int
    a1: int
    a2: int


class KvmSetAttributes(Event, frozen=True, tag="kvm_set_attributes"):
    """Per-VM attributes (KVM_SET_MEMORY_ATTRIBUTES) of the frames `start`..`end`."""

    vm: int
    start: int
    end: int
    attributes: int


# Userspace. `mm` is the number of the address space.


class UserFault(Event, frozen=True, tag="user_fault"):
    """A host access that missed the page table. `result` is mapped, SIGBUS or SIGSEGV."""

    mm: int
    hva: int
    write: bool
    result: str


class UserZap(Event, frozen=True, tag="user_zap"):
    """`entries` page-table entries between the addresses `start` and `end` were removed."""

    mm: int
    start: int
    end: int
    entries: int


class UserPin(Event, frozen=True, tag="user_pin"):
    mm: int
    hva: int
    pages: int


class UserUnpin(Event, frozen=True, tag="user_unpin"):
    mm: int
    hva: int
    pages: int


# IOMMU. Pages are IOVA >> 12; `domain` is the number of a page table, 0 for none.


class IommuAttach(Event, frozen=True, tag="iommu_attach"):
    """A device's DMA goes through another domain from now on."""

    device: int
    domain: int


class IommuMap(Event, frozen=True, tag="iommu_map"):
    """A leaf was installed. `access` is that of the domain; `pfn` -1 for a pinned page."""

    domain: int
    page: int
    order: int
    access: str
    pfn: int


class IommuUnmap(Event, frozen=True, tag="iommu_unmap"):
    """`leaves` leaves between the pages `start` and `end` were removed."""

    domain: int
    start: int
    end: int
    leaves: int


class IommuFault(Event, frozen=True, tag="iommu_fault"):
    """A DMA was not allowed: `rule` says why."""

    domain: int
    device: int
    iova: int
    write: bool
    rule: str


class MachineCheck(Event, frozen=True, tag="machine_check"):
    """A device's DMA has poisoned a guest's page: a real machine is reset."""

    device: int
    iova: int


class IommuRevoke(Event, frozen=True, tag="iommu_revoke"):
    """An area maps nothing any more."""

    ioas: int
    start: int
    end: int
    why: str


class Refused(Event, frozen=True, tag="refused"):
    """A call that got an errno, and the rule that gave it."""

    call: str
    errno: str
    rule: str
    facts: str
