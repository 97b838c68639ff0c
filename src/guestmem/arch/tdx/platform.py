"""TDX as KVM sees it: one TD for each virtual machine, and the calls that each step of KVM needs, in their order.

The Secure EPT is the page table and the ownership table in one: a page leaves the TD when its leaf is zapped, and its
bytes with it. So an entry lasts as long as the leaf under every policy (Lifetime), and moving a memslot loses what was
in it. A guest accepts a page with TDG.MEM.PAGE.ACCEPT, or, by default, when it first touches it; and finds zeros.

Source: arch/x86/kvm/vmx/tdx.c tdx_td_init, tdx_sept_set_private_spte, tdx_sept_remove_private_spte,
tdx_gmem_post_populate, tdx_mmu_release_hkid, tdx_vm_destroy; spec/semantics.md section 14.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence

from guestmem.arch.architecture import (
    UNDEFINED,
    Accept,
    Done,
    Faults,
    FirmwareError,
    GuestInstruction,
    Outcome,
    Owner,
)
from guestmem.arch.dma import Block
from guestmem.arch.tdx.leaves import TdLeaves
from guestmem.arch.tdx.lent_pages import LentPages
from guestmem.arch.tdx.manage import TDCS_PAGES
from guestmem.arch.tdx.memory_calls import MemoryCalls
from guestmem.arch.tdx.pamt import PageType
from guestmem.arch.tdx.parameters import DEFAULT_PARAMS, TdParams
from guestmem.arch.tdx.status import TdxError
from guestmem.arch.tdx.td import LEVEL_2M, LEVEL_ROOT, OpState, Sept
from guestmem.cpu.engine import PageBit
from guestmem.memory import PAGE_SIZE, Pfn, read_host, write_host

NOT_MEASURED = 1
"""Kind of a page that is added and not measured: KVM_TDX_INIT_MEM_REGION without KVM_TDX_MEASURE_MEMORY_REGION."""
SHARED_BIT = PageBit(47, set_is_private=False)
"""The top bit of a guest-physical address of 48 bits (GPAW 0), which is what a Secure EPT of four levels goes with."""
_ZEROS = bytes(PAGE_SIZE)


class TdxPlatform:
    """A machine with the TDX module. `fails(name)` true makes the call of that name end busy.

    With `guests_accept` guests accept a page that they find pending, as kernels that accept memory lazily do; without,
    such a page is a fault to them.
    """

    name = "TDX"
    has_private_memory = True

    def __init__(
        self,
        *,
        hkids: int = 509,
        packages: int = 1,
        dynamic_pamt: bool = True,
        guests_accept: bool = True,
        fails: Callable[[str], bool] | None = None,
    ) -> None:
        self.module = MemoryCalls(hkids=hkids, packages=packages, dynamic_pamt=dynamic_pamt, fails=fails)
        self.lent = LentPages(self.module)
        self.guests_accept = guests_accept
        self.guests: dict[Pfn, TdxGuest] = {}
        self.lost: set[Pfn] = set()  # TDs that could not be taken down, by TDR

    def new_guest(self, number: int, generation: int) -> TdxGuest:
        return TdxGuest(self, number, generation)

    def owner(self, pfn: Pfn) -> Owner | None:
        found = self.module.pamt.find(pfn)
        if found is None or found[1].type is not PageType.REG:
            return None
        start, entry = found
        guest = self.guests[entry.owner]
        return Owner(guest.number, guest.generation, guest.gfns[start] + pfn - start)

    def owned(self) -> Iterable[tuple[Pfn, Owner]]:
        for start, entry in self.module.pamt.entries.items():
            if entry.type is PageType.REG:
                guest = self.guests[entry.owner]
                for number in range(1 << entry.order):
                    yield Pfn(start + number), Owner(guest.number, guest.generation, guest.gfns[start] + number)

    def live_guests(self) -> int:
        return len(self.module.tds.keys() - self.lost)

    def host_read(self, pfn: Pfn, hva: int) -> bytes:
        """Zeros: who is not in SEAM mode finds no other bytes in a TD's line. Source: TDX module base spec 16.2.3."""
        return _ZEROS if self.owner(pfn) is not None else read_host(hva, PAGE_SIZE)


class TdxGuest(TdLeaves):
    """A TD. It exists from `start` on; `number` is its HKID."""

    has_tables = True
    page_bit = SHARED_BIT
    state_pages = None
    has_vcpus = True

    def __init__(self, platform: TdxPlatform, number: int, generation: int) -> None:
        super().__init__(platform.module, platform.lent)
        self.number = number
        self.generation = generation
        self._platform = platform

    @property
    def launched(self) -> bool:
        td = self._module.tds.get(self.tdr)
        return td is not None and td.op_state is OpState.RUNNABLE

    # Launch

    def start(self, parameters: TdParams | None = None) -> None:
        """KVM_TDX_INIT_VM: TDH.MNG.CREATE, KEY.CONFIG, ADDCX and INIT. What was begun is taken back if one fails."""
        if self.tdr:
            raise FirmwareError("KVM_TDX_INIT_VM", "TD_STATE_INITIALIZED", tdr=self.tdr)
        module, lent = self._module, self._lent
        tdr = lent.take()
        try:
            module.mng_create(tdr, self.number)
        except FirmwareError:
            lent.give_back(tdr)
            raise
        self.tdr = tdr
        self._platform.guests[tdr] = self
        try:
            for package in module.packages:
                module.mng_key_config(tdr, package)
            for _ in range(TDCS_PAGES):
                self._lent.lend(lambda page: module.mng_addcx(tdr, page))
            module.mng_init(tdr, parameters or DEFAULT_PARAMS)
        except FirmwareError:
            self.teardown()
            raise

    def populate(self, gfn: int, block: Block, source: bytes | None, kind: int = 0) -> None:
        """KVM_TDX_INIT_MEM_REGION for one page: TDH.MEM.PAGE.ADD, and TDH.MR.EXTEND sixteen times."""
        self._add_tables(gfn, 0)
        self._lent.cover(block.pfn)
        try:
            self._module.mem_page_add(self.tdr, gfn, block.pfn, block.hva, source)
        except FirmwareError:
            self._lent.uncover(block.pfn)
            raise
        self.gfns[block.pfn] = gfn
        if kind != NOT_MEASURED:
            self._measure(gfn)

    def _measure(self, gfn: int) -> None:
        """Raises: FirmwareError with the fact `unmeasured`: the page was added, and its bytes are not in MRTD."""
        for gpa in range(gfn * PAGE_SIZE, (gfn + 1) * PAGE_SIZE, 256):
            try:
                self._module.mr_extend(self.tdr, gpa)
            except FirmwareError as error:
                error.facts["unmeasured"] = True
                raise

    def corrects(self, kind: int) -> bool:
        return False

    def finalize(self, vcpu_states: Mapping[int, bytes], parameters: bool | None = None) -> bytes:
        """KVM_TDX_FINALIZE_VM; before, unless `parameters` is true, KVM_TDX_INIT_VCPU of each that is without. What
        registers hold is not part of MRTD."""
        for vcpu in () if parameters else vcpu_states:
            self.vcpus.add(self.tdr, vcpu)
        return self._module.mr_finalize(self.tdr)

    # vCPUs

    @property
    def inside(self) -> set[int]:
        return self.vcpus.inside

    def enter(self, vcpu: int) -> None:
        self.vcpus.enter(self.tdr, vcpu)

    def leave(self, vcpu: int) -> None:
        self.vcpus.leave(self.tdr, vcpu)

    # Pages

    def leaf_order(self, gfn: int, block: Block) -> int:
        """4K where a table is in the way or part of the block is a TD's: KVM does not promote by itself."""
        td = self._module.tds.get(self.tdr)
        if td is None or block.order == 0:
            return 0
        found = td.sept.leaf(gfn)
        if found is not None:
            return min(9 * found[0], block.order)
        table = td.sept.get(gfn, LEVEL_2M)
        pamt = self._module.pamt
        region = block.pfn + (gfn % block.pages) >> 9
        in_use = table is not None or pamt.used(region) or region in pamt.pairs
        return 0 if in_use or block.order < 9 or td.op_state is not OpState.RUNNABLE else 9

    def make_private(self, gfn: int, block: Block) -> None:
        """TDH.MEM.PAGE.AUG with the tables that it needs; the guest has to accept it. Before the TD is finalized KVM
        does not, though the module would: what a guest begins with is added."""
        td = self._module.tds.get(self.tdr)
        found = td.sept.leaf(gfn) if td is not None else None
        if found is not None:
            level, entry = found
            if entry.pfn + gfn % (1 << 9 * level) == block.pfn:
                self._unblock([(gfn >> 9 * level << 9 * level, level)])
                entry = self.td.sept.get(gfn, level) or entry
                if entry.state in (Sept.MAPPED, Sept.PENDING):
                    return
        if td is not None and td.op_state is not OpState.RUNNABLE:
            raise FirmwareError("TDH.MEM.PAGE.AUG", "TD_STATE_INITIALIZED", gfn=gfn)
        level = block.order // 9
        self._add_tables(gfn, level)
        if not level:
            self._lent.cover(block.pfn)
        try:
            self._module.mem_page_aug(self.tdr, gfn, level, block.pfn, block.hva)
        except FirmwareError:
            self._lent.uncover(block.pfn)
            raise
        self.gfns[block.pfn] = gfn

    def make_shared(self, blocks: Sequence[Block]) -> None:
        """TDH.MEM.PAGE.DEMOTE of leaves that stick out, RANGE.BLOCK of each, one TRACK: undone if one fails. Then
        PAGE.REMOVE of each, and what was removed before one fails is lost: zeros, to be accepted."""
        ranges = [frames for block in blocks for frames in self._frames(block)]
        if not ranges:
            return
        for gfn, pages in ranges:
            self._demote_what_sticks_out(gfn, pages)
        leaves = [leaf for gfn, pages in ranges for leaf in self._leaves(gfn, pages)]
        bad = leaves[0]
        try:
            for bad in leaves:
                self._range_block(*bad)
            self._track()
            for bad in leaves:
                self._page_remove(*bad)
        except FirmwareError as error:
            entry = self.td.sept.get(*bad)
            assert entry is not None
            error.facts["pfn"] = entry.pfn
            self._unblock(leaf for leaf in leaves if leaf != bad)
            raise

    def reclaim(self, block: Block) -> None:
        """Nothing, after the zap; pages that no leaf of KVM's ever showed are removed now."""
        for gfn, pages in self._frames(block):
            self.invalidate(gfn, pages)

    def check_access(self, gfn: int, pfn: Pfn, order: int, write: bool) -> bool:
        td = self._module.tds.get(self.tdr)
        found = td.sept.leaf(gfn) if td is not None else None
        if found is None:
            return False
        level, entry = found
        self._module.td_read(self.tdr, gfn)
        if entry.state is Sept.PENDING and self._platform.guests_accept:
            self._module.page_accept(self.tdr, gfn >> 9 * level << 9 * level, level)
            level, entry = self.td.sept.leaf(gfn) or found
        return entry.state is Sept.MAPPED and entry.pfn + gfn % (1 << 9 * level) == pfn

    def execute(self, instruction: GuestInstruction, leaf: tuple[Pfn, int] | None) -> Outcome:
        """TDG.MEM.PAGE.ACCEPT; the value is all of RAX. A page that the Secure EPT does not have is KVM's to add."""
        if not isinstance(instruction, Accept):
            return UNDEFINED
        gfn = instruction.gpa // PAGE_SIZE
        if leaf is None or self.td.sept.leaf(gfn) is None:
            return Faults()
        try:
            self._module.page_accept(self.tdr, gfn, LEVEL_2M if instruction.large else 0)
        except TdxError as error:
            return Done(error.status)
        return Done(0)

    # The end

    def teardown(self) -> bool:
        """tdx_mmu_release_hkid, then TDH.PHYMEM.PAGE.RECLAIM of everything. If a call fails, the HKID and what is
        still the TD's are never used again."""
        module = self._module
        td = module.tds.get(self.tdr)
        if td is None:
            return True
        try:
            for vcpu in td.vcpus.values():
                if vcpu.cpu is not None:
                    module.vp_flush(td.tdr, vcpu.tdvpr, vcpu.cpu)
            module.mng_vpflushdone(td.tdr)
            for package in module.packages:
                module.phymem_cache_wb(package)
            module.mng_key_freeid(td.tdr)
            self._reclaim_all()
        except FirmwareError:
            self._platform.lost.add(self.tdr)
            return False
        return True

    def _reclaim_all(self) -> None:
        module = self._module
        td = module.tds[self.tdr]
        for level in td.sept.levels:
            for entry in level.values():
                self._reclaim_page(entry.pfn, entry.hva)
        for page in [*td.tdcx, *td.vcpus]:
            self._reclaim_page(page)
        self._reclaim_page(td.tdr)
        del self._platform.guests[td.tdr]
        self.gfns.clear()
        self.vcpus.tdvprs.clear()
        self.tdr = Pfn(0)

    def _reclaim_page(self, pfn: Pfn, hva: int = 0) -> None:
        order = self._module.pamt.entries[pfn].order
        if self._module.phymem_page_reclaim(pfn) is PageType.REG:
            write_host(hva, bytes(PAGE_SIZE << order))
            self._lent.uncover(pfn)
        else:
            self._lent.give_back(pfn)

    # Parts

    def _add_tables(self, gfn: int, level: int) -> None:
        """TDH.MEM.SEPT.ADD for each table missing above an entry of `level`."""
        td = self._module.tds.get(self.tdr)
        for above in range(LEVEL_ROOT, level, -1):
            if td is not None and td.sept.get(gfn, above) is None:
                start = gfn >> 9 * above << 9 * above
                self._lent.lend(functools.partial(self._module.mem_sept_add, self.tdr, start, above))

    def _frames(self, block: Block) -> list[tuple[int, int]]:
        """Where pages of the block are in this TD: first frame and how many, run by run."""
        runs: list[tuple[int, int]] = []
        for pfn in range(block.pfn, block.pfn + block.pages):
            owner = self._platform.owner(Pfn(pfn))
            if owner is None:
                continue
            if owner.generation != self.generation or owner.gfn is None:
                raise FirmwareError("TDH.MEM.PAGE.REMOVE", "TDX_PAGE_NOT_OWNED_BY_TD", pfn=pfn)
            if runs and owner.gfn == sum(runs[-1]):
                runs[-1] = runs[-1][0], runs[-1][1] + 1
            else:
                runs.append((owner.gfn, 1))
        return runs
