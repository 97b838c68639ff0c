"""pKVM as KVM sees it: pages are donated to a protected guest, lent by it, taken back by it, and reclaimed at its end.

Conversions keep bytes, so a guest can hand over a buffer; a page that leaves is scrubbed. They are different calls for
that reason (known bug B23). A page stays the guest's until it is reclaimed, whatever the host's page tables say:
`invalidate` does nothing, and a page that is bound elsewhere cannot be donated a second time.

Source: arch/arm64/kvm/pkvm.c; spec/semantics.md section 16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from guestmem.arch.architecture import UNDEFINED, FirmwareError, GuestInstruction, Outcome, Owner
from guestmem.arch.dma import Block
from guestmem.arch.pkvm.dma import PkvmDma
from guestmem.arch.pkvm.hypervisor import Hypervisor, HypVm, PageState
from guestmem.memory import PAGE_SIZE, Pfn, read_host, write_host


class PkvmPlatform:
    """A machine under pKVM's hypervisor. `fails(name)` true makes the call of that name fail."""

    name = "pKVM"
    has_private_memory = True

    def __init__(self, *, fails: Callable[[str], bool] | None = None) -> None:
        self.hypervisor = Hypervisor(fails)
        self.guests: dict[int, PkvmGuest] = {}  # by handle

    def new_guest(self, number: int, generation: int) -> PkvmGuest:
        guest = self.guests[number] = PkvmGuest(self, number, generation)
        return guest

    def owner(self, pfn: Pfn) -> Owner | None:
        vm = self.hypervisor.owner.get(pfn)
        if vm is None or self.hypervisor.host.get(pfn) is not PageState.NOPAGE:
            return None
        return Owner(vm.handle, self.guests[vm.handle].generation, vm.frames[pfn])

    def owned(self) -> Iterable[tuple[Pfn, Owner]]:
        for pfn in self.hypervisor.owner:
            owner = self.owner(pfn)
            if owner is not None:
                yield pfn, owner

    def live_guests(self) -> int:
        return len(self.hypervisor.vms)

    def host_read(self, pfn: Pfn, hva: int) -> bytes:
        """Raises: FirmwareError, for a page that the host has given away: SIGBUS to a user, a fault in the kernel."""
        if self.hypervisor.host.get(pfn) is PageState.NOPAGE:
            raise FirmwareError("host stage 2", "fault", pfn=pfn)
        return read_host(hva, PAGE_SIZE)


class PkvmGuest:
    """A protected VM. The hypervisor knows it from its first page on, or from `start`."""

    has_tables = True
    page_bit = None
    state_pages = None
    has_vcpus = True

    def __init__(self, platform: PkvmPlatform, number: int, generation: int) -> None:
        self.number = number
        self.generation = generation
        self.dma = PkvmDma(number, platform)
        self.launched = False  # the hypervisor has no such state: it is the host that begins when it is ready
        self.inside: set[int] = set()
        self._platform = platform
        self._hypervisor = platform.hypervisor

    # Launch

    def start(self, parameters: object = None) -> None:
        self._hypervisor.init_vm(self.number)

    def populate(self, gfn: int, block: Block, source: bytes | None, kind: int = 0) -> None:
        """The host writes what the guest begins with, and donates the page. Nothing is measured: the guest's own
        firmware checks what it was given."""
        if source is not None:
            write_host(block.hva, source)
        self.make_private(gfn, block)

    def corrects(self, kind: int) -> bool:
        return False

    def finalize(self, vcpu_states: Mapping[int, bytes], parameters: object = None) -> bytes:
        self.launched = True
        return b""

    # vCPUs

    def enter(self, vcpu: int) -> None:
        """__pkvm_vcpu_load. The hypervisor makes a vCPU when it first runs, so it knows them all."""
        self._hypervisor.vcpu_load(self._vm().handle)
        self.inside.add(vcpu)

    def leave(self, vcpu: int) -> None:
        """__pkvm_vcpu_put."""
        if vcpu in self.inside:
            self._hypervisor.vcpu_put(self.number)
            self.inside.remove(vcpu)

    # Pages

    def leaf_order(self, gfn: int, block: Block) -> int:
        return block.order

    def make_private(self, gfn: int, block: Block) -> None:
        """__pkvm_host_donate_guest, or __pkvm_guest_unshare_host for pages that the guest had lent. All or none."""
        vm = self._vm()
        lent: list[int] = []
        mine: list[tuple[Pfn, int, int]] = []
        for number in range(block.pages):
            at, pfn = gfn + number, Pfn(block.pfn + number)
            page = vm.pages.get(at)
            if page is None or page.pfn != pfn:
                self._hypervisor.check_donation(self.number, pfn, at)
                mine.append((pfn, at, block.hva + number * PAGE_SIZE))
            elif page.state is PageState.SHARED_OWNED:
                lent.append(at)
        for at in lent:
            self._hypervisor.guest_unshare_host(self.number, at)
        for donation in mine:
            self._hypervisor.host_donate_guest(self.number, *donation, checked=True)

    def make_shared(self, blocks: Sequence[Block]) -> None:
        """__pkvm_guest_share_host of what is the guest's alone; bytes stay. After its checks it cannot fail."""
        for gfn in (gfn for block in blocks for gfn in self._frames(block)):
            page = self._vm().pages[gfn]
            if page.state is PageState.OWNED:
                self._hypervisor.guest_share_host(self.number, gfn)
                self.dma.followers.tell(page.pfn, 1)

    def reclaim(self, block: Block) -> None:
        """__pkvm_host_force_reclaim_page_guest: scrubbed, and gone from the guest's stage 2. It takes no page that is
        lent, so the guest takes that back first."""
        for gfn in self._frames(block):
            page = self._vm().pages[gfn]
            if page.state is PageState.SHARED_OWNED:
                self._hypervisor.guest_unshare_host(self.number, gfn)
            self._hypervisor.host_force_reclaim_page_guest(page.pfn)
            self.dma.followers.tell(page.pfn, 1)

    def invalidate(self, gfn: int, pages: int) -> None:
        """A protected guest's stage 2 is not the host's to change."""

    def split(self, gfn: int, order: int) -> None:
        """The hypervisor splits its blocks itself."""

    def merge(self, gfn: int, order: int) -> None:
        """The hypervisor keeps what it has."""

    def check_access(self, gfn: int, pfn: Pfn, order: int, write: bool) -> bool:
        page = self._vm().pages.get(gfn)
        return page is not None and page.pfn == pfn and page.state is PageState.OWNED

    # The end

    def execute(self, instruction: GuestInstruction, leaf: tuple[Pfn, int] | None) -> Outcome:
        return UNDEFINED

    def teardown(self) -> bool:
        """__pkvm_start_teardown_vm, each page reclaimed, __pkvm_finalize_teardown_vm."""
        vm = self._hypervisor.vms.get(self.number)
        if vm is not None:
            self._hypervisor.start_teardown_vm(self.number)
            for gfn in list(vm.pages):
                self._hypervisor.reclaim_dying_guest_page(self.number, gfn)
            self._hypervisor.finalize_teardown_vm(self.number)
        del self._platform.guests[self.number]
        return True

    def _vm(self) -> HypVm:
        """Source: pkvm_create_hyp_vm, when a vCPU first runs."""
        vm = self._hypervisor.vms.get(self.number)
        return vm if vm is not None else self._hypervisor.init_vm(self.number)

    def _frames(self, block: Block) -> Iterable[int]:
        """The frames at which pages of the block are this guest's."""
        frames = self._vm().frames
        return [frames[pfn] for pfn in map(Pfn, range(block.pfn, block.pfn + block.pages)) if pfn in frames]
