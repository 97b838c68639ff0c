"""The hypervisor of pKVM: who owns each page, between the host, the hypervisor and protected guests.

An owner may lend a page: it has it SHARED_OWNED then, the other SHARED_BORROWED. A page given away is NOPAGE to who
gave it. The host's table has every page of the machine, OWNED unless it says otherwise. Calls return an errno, and
change nothing if they do.

Source: arch/arm64/kvm/hyp/nvhe/mem_protect.c __pkvm_host_share_hyp, __pkvm_host_donate_hyp, __pkvm_host_donate_guest,
__pkvm_guest_share_host, __pkvm_guest_unshare_host, __pkvm_host_reclaim_page_guest,
__pkvm_host_force_reclaim_page_guest; pkvm.c __pkvm_start_teardown_vm, __pkvm_finalize_teardown_vm,
__pkvm_reclaim_dying_guest_page.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import NamedTuple

from guestmem.arch.architecture import FirmwareError
from guestmem.memory import PAGE_SIZE, Pfn, write_host


class PageState(enum.Enum):
    """What one of the three has of a page (enum pkvm_page_state)."""

    OWNED = "PKVM_PAGE_OWNED"
    SHARED_OWNED = "PKVM_PAGE_SHARED_OWNED"
    SHARED_BORROWED = "PKVM_PAGE_SHARED_BORROWED"
    NOPAGE = "PKVM_NOPAGE"


class GuestPage(NamedTuple):
    """An entry of a guest's stage 2. `hva` is where its bytes are in this program."""

    pfn: Pfn
    state: PageState
    hva: int

    def __fingerprint__(self) -> tuple[int, str]:
        return self.pfn, self.state.value


class HypVm:
    """A protected VM. `pages` by guest frame."""

    def __init__(self, handle: int) -> None:
        self.handle = handle
        self.dying = False
        self.loaded_vcpus = 0
        self.pages: dict[int, GuestPage] = {}
        self.frames: dict[Pfn, int] = {}


class Hypervisor:
    """`fails(name)` true makes the call of that name return -ENOMEM: no page for a table."""

    def __init__(self, fails: Callable[[str], bool] | None = None) -> None:
        self.host: dict[Pfn, PageState] = {}  # of pages that are not simply the host's
        self.hyp: dict[Pfn, PageState] = {}
        self.vms: dict[int, HypVm] = {}
        self.owner: dict[Pfn, HypVm] = {}  # of pages in a guest's stage 2
        self._fails = fails or (lambda _: False)

    # Host and hypervisor

    def host_share_hyp(self, pfn: Pfn) -> None:
        self._move("__pkvm_host_share_hyp", pfn, PageState.OWNED, PageState.NOPAGE)
        self.host[pfn], self.hyp[pfn] = PageState.SHARED_OWNED, PageState.SHARED_BORROWED

    def host_unshare_hyp(self, pfn: Pfn) -> None:
        self._move("__pkvm_host_unshare_hyp", pfn, PageState.SHARED_OWNED, PageState.SHARED_BORROWED)
        del self.host[pfn], self.hyp[pfn]

    def host_donate_hyp(self, pfn: Pfn) -> None:
        self._move("__pkvm_host_donate_hyp", pfn, PageState.OWNED, PageState.NOPAGE)
        self.host[pfn], self.hyp[pfn] = PageState.NOPAGE, PageState.OWNED

    def hyp_donate_host(self, pfn: Pfn) -> None:
        self._move("__pkvm_hyp_donate_host", pfn, PageState.NOPAGE, PageState.OWNED)
        del self.host[pfn], self.hyp[pfn]

    # Host and guest

    def init_vm(self, handle: int) -> HypVm:
        """__pkvm_init_vm."""
        if handle in self.vms:
            raise FirmwareError("__pkvm_init_vm", "-EEXIST", handle=handle)
        self.vms[handle] = HypVm(handle)
        return self.vms[handle]

    def check_donation(self, handle: int, pfn: Pfn, gfn: int) -> None:
        """What the call below asks of each page of its range, before it takes the first."""
        call = "__pkvm_host_donate_guest"
        vm = self._live(call, handle)
        if self._fails(call):
            raise FirmwareError(call, "-ENOMEM", pfn=pfn)
        self._check_host(call, pfn, PageState.OWNED)
        if gfn in vm.pages:
            raise FirmwareError(call, "-EPERM", gfn=gfn, guest=vm.pages[gfn].state.value)

    def host_donate_guest(self, handle: int, pfn: Pfn, gfn: int, hva: int, *, checked: bool = False) -> None:
        """The host gives a page away; the guest finds in it what the host put there."""
        if not checked:
            self.check_donation(handle, pfn, gfn)
        vm = self.vms[handle]
        self.host[pfn] = PageState.NOPAGE
        self.owner[pfn] = vm
        vm.pages[gfn] = GuestPage(pfn, PageState.OWNED, hva)
        vm.frames[pfn] = gfn

    def guest_share_host(self, handle: int, gfn: int) -> None:
        """The guest lends a page to the host, bytes and all (hypercall MEM_SHARE)."""
        call = "__pkvm_guest_share_host"
        vm, page = self._guest_page(call, handle, gfn, PageState.OWNED)
        self._check_host(call, page.pfn, PageState.NOPAGE)
        vm.pages[gfn] = page._replace(state=PageState.SHARED_OWNED)
        self.host[page.pfn] = PageState.SHARED_BORROWED

    def guest_unshare_host(self, handle: int, gfn: int) -> None:
        """The guest takes it back (hypercall MEM_UNSHARE)."""
        call = "__pkvm_guest_unshare_host"
        vm, page = self._guest_page(call, handle, gfn, PageState.SHARED_OWNED)
        self._check_host(call, page.pfn, PageState.SHARED_BORROWED)
        vm.pages[gfn] = page._replace(state=PageState.OWNED)
        self.host[page.pfn] = PageState.NOPAGE

    def host_force_reclaim_page_guest(self, pfn: Pfn) -> None:
        """The host takes a page back from a guest that lives: scrubbed, and the guest faults where it was. What is not
        taken from the host (its own, or lent to it) needs no reclaim: try the access again."""
        call = "__pkvm_host_force_reclaim_page_guest"
        vm = self.owner.get(pfn)
        if self._fails(call) or self._host(pfn) is not PageState.NOPAGE:
            raise FirmwareError(call, "-EAGAIN", pfn=pfn, host=self._host(pfn).value)
        if vm is None:
            raise FirmwareError(call, "-EPERM", pfn=pfn, owner="hypervisor")
        self._reclaim(vm, vm.frames[pfn])

    # The end of a guest

    def vcpu_load(self, handle: int) -> None:
        """__pkvm_vcpu_load: a vCPU is on this CPU, and the VM is not torn down meanwhile."""
        self._live("__pkvm_vcpu_load", handle).loaded_vcpus += 1

    def vcpu_put(self, handle: int) -> None:
        """__pkvm_vcpu_put."""
        self.vms[handle].loaded_vcpus -= 1

    def start_teardown_vm(self, handle: int) -> None:
        call = "__pkvm_start_teardown_vm"
        vm = self._unreferenced(call, handle)
        if vm.dying:
            raise FirmwareError(call, "-EINVAL", dying=True)
        vm.dying = True

    def reclaim_dying_guest_page(self, handle: int, gfn: int) -> None:
        """A page of a guest that is torn down goes back: scrubbed, if it was the guest's alone."""
        call = "__pkvm_reclaim_dying_guest_page"
        vm = self.vms.get(handle)
        if vm is None or not vm.dying:
            raise FirmwareError(call, "-EINVAL", handle=handle)
        if gfn not in vm.pages:
            raise FirmwareError(call, "-ENOENT", gfn=gfn)
        self._reclaim(vm, gfn)

    def finalize_teardown_vm(self, handle: int) -> None:
        """The handle may be used again. The host has reclaimed every page before, or never gets it back."""
        call = "__pkvm_finalize_teardown_vm"
        vm = self._unreferenced(call, handle)
        if not vm.dying:
            raise FirmwareError(call, "-EINVAL", dying=False)
        del self.vms[handle]

    # Parts

    def _reclaim(self, vm: HypVm, gfn: int) -> None:
        page = vm.pages.pop(gfn)
        if page.state is PageState.OWNED:
            write_host(page.hva, bytes(PAGE_SIZE))  # hyp_poison_page
        del self.host[page.pfn], self.owner[page.pfn], vm.frames[page.pfn]

    def _host(self, pfn: Pfn) -> PageState:
        return self.host.get(pfn, PageState.OWNED)

    def _check_host(self, call: str, pfn: Pfn, state: PageState) -> None:
        if self._host(pfn) is not state:
            raise FirmwareError(call, "-EPERM", pfn=pfn, host=self._host(pfn).value)

    def _move(self, call: str, pfn: Pfn, host: PageState, hyp: PageState) -> None:
        self._check_host(call, pfn, host)
        found = self.hyp.get(pfn, PageState.NOPAGE)
        if found is not hyp:
            raise FirmwareError(call, "-EPERM", pfn=pfn, hyp=found.value)

    def _unreferenced(self, call: str, handle: int) -> HypVm:
        """Source: get_pkvm_unref_hyp_vm_locked: a loaded vCPU is a reference."""
        vm = self.vms.get(handle)
        if vm is None or vm.loaded_vcpus:
            raise FirmwareError(call, "-EINVAL", handle=handle, vcpus=0 if vm is None else vm.loaded_vcpus)
        return vm

    def _live(self, call: str, handle: int) -> HypVm:
        vm = self.vms.get(handle)
        if vm is None or vm.dying:
            raise FirmwareError(call, "-EINVAL", handle=handle)
        return vm

    def _guest_page(self, call: str, handle: int, gfn: int, state: PageState) -> tuple[HypVm, GuestPage]:
        vm = self._live(call, handle)
        page = vm.pages.get(gfn)
        if page is None:
            raise FirmwareError(call, "-ENOENT", gfn=gfn)
        if page.state is not state:
            raise FirmwareError(call, "-EPERM", gfn=gfn, guest=page.state.value)
        return vm, page
