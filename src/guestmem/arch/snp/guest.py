"""SEV-SNP as KVM sees it: what arch/x86/kvm/svm/sev.c does with the RMP and the firmware for each of KVM's calls.

Bytes. A page of the guest has plaintext in its backing, and what is "in memory" is `MemoryKey.encrypt` of it. When a
page is assigned the guest sees decrypted what is in memory: garbage, unless the same guest encrypted it at the same
place. When it is taken back the host sees ciphertext.

Source: sev_gmem_prepare, sev_gmem_invalidate, snp_launch_start, sev_gmem_post_populate, snp_launch_finish,
sev_vm_destroy; in-place v8's make_shared; 934002cd660b (DECOMMISSION on error paths).
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress

from guestmem.arch.architecture import FirmwareError, GuestInstruction, Outcome, Owner
from guestmem.arch.dma import Block
from guestmem.arch.snp.cipher import MemoryKey
from guestmem.arch.snp.digest import PageType
from guestmem.arch.snp.dma import SnpDma
from guestmem.arch.snp.firmware import Context, Firmware, GuestState, SevStatus
from guestmem.arch.snp.id_block import NO_ID_BLOCK, LaunchFinish
from guestmem.arch.snp.instructions import execute
from guestmem.arch.snp.policy import DEFAULT as DEFAULT_POLICY
from guestmem.arch.snp.rmp import FIRST_OWN, READ, WRITE, Entry, Fault, Rmp, State, Status
from guestmem.arch.snp.vcpus import OwnPages, SnpVcpus
from guestmem.arch.snp.vmsa import SNP_ACTIVE
from guestmem.cpu.engine import PageBit
from guestmem.memory import PAGE_SHIFT, PAGE_SIZE, Pfn, read_host, write_host

C_BIT = PageBit(51, set_is_private=True)
"""Of processors from Milan on; the first that had SEV have bit 47. Source: CPUID Fn8000_001F EBX[5:0]."""


class SnpPlatform:
    """A machine with SNP: one RMP, one firmware. `pages` of memory; large entries have `large_order`, 0 for none.

    With `guests_validate` guests run PVALIDATE on a page that they find not validated, as kernels that accept memory
    lazily do; without, such a page is a fault to them.
    """

    name = "snp"
    has_private_memory = True

    def __init__(
        self,
        pages: int,
        *,
        large_order: int = 9,
        guests_validate: bool = True,
        fails: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self.rmp = Rmp(pages, large_order, fails)
        self.firmware = Firmware(self.rmp, fails=fails)
        self.own_pages = OwnPages()
        self.guests_validate = guests_validate
        self.lost_contexts = 0  # that firmware would not decommission
        self.keys: dict[int, tuple[int, MemoryKey]] = {}  # by ASID: the generation that has it, and its key

    def new_guest(self, number: int, generation: int) -> SnpGuest:
        self.keys[number] = generation, MemoryKey(generation)
        return SnpGuest(self, number, generation)

    def owner(self, pfn: Pfn) -> Owner | None:
        found = self.rmp.lookup(pfn)
        if found is None:
            return None
        asid = found[1].asid
        return Owner(asid, self.keys[asid][0], self.rmp.gfn_of(pfn))

    def owned(self) -> Iterator[tuple[Pfn, Owner]]:
        for base, entry in self.rmp.entries():
            if base >= FIRST_OWN:
                continue
            for number in range(1 << self.rmp.large_order if entry.large else 1):
                yield Pfn(base + number), Owner(entry.asid, self.keys[entry.asid][0], entry.gfn + number)

    def vmsas(self) -> Iterator[tuple[Pfn, Owner]]:
        """KVM's own pages that are a guest's: the VMSAs that a launch made."""
        for pfn, entry in self.rmp.entries():
            if pfn >= FIRST_OWN:
                yield pfn, Owner(entry.asid, self.keys[entry.asid][0], None)

    def live_guests(self) -> int:
        return len(self.firmware.contexts) - self.lost_contexts

    def host_read(self, pfn: Pfn, hva: int) -> bytes:
        """Reads are never refused: a guest's page shows its ciphertext."""
        stored = read_host(hva, PAGE_SIZE)
        found = self.rmp.lookup(pfn)
        return stored if found is None else self.keys[found[1].asid][1].encrypt(pfn, stored)

    def read_as(self, number: int, pfn: Pfn, hva: int) -> bytes:
        """What a guest of another ASID would read, could it reach the page."""
        return self.keys[number][1].decrypt(pfn, self.host_read(pfn, hva))


class SnpGuest:
    """One SNP virtual machine: an ASID, and from `start` on a guest context."""

    has_tables = True
    page_bit = C_BIT
    has_vcpus = True

    def __init__(self, platform: SnpPlatform, asid: int, generation: int) -> None:
        self.platform = platform
        self.asid = asid
        self.generation = generation
        self.context: Context | None = None
        self.vmsa_features = SNP_ACTIVE
        self.ended = False
        self.vcpus = SnpVcpus(platform.rmp, platform.firmware, platform.own_pages, asid)
        self.dma = SnpDma(platform.rmp, asid, self._smash)
        self._key = platform.keys[asid][1]

    @property
    def launched(self) -> bool:
        """Whether SNP_LAUNCH_FINISH was done: VMRUN wants a VMSA page, which firmware makes then."""
        return self.context is not None and self.context.state is GuestState.RUNNING

    # Pages

    def leaf_order(self, gfn: int, block: Block) -> int:
        """Source: sev_private_max_mapping_level: the size of the RMP entry, where there is one."""
        large_order = self.platform.rmp.large_order
        if not large_order or block.order < large_order:
            return 0
        found = self.platform.rmp.lookup(block.pfn)
        if found is not None:
            return large_order if found[1].large else 0
        return large_order if self._all_free(block) and not gfn & ((1 << large_order) - 1) else 0

    def make_private(self, gfn: int, block: Block) -> None:
        """RMPUPDATE, unless the page is assigned: to whichever address, as in sev_gmem_prepare."""
        found = self.platform.rmp.lookup(block.pfn)
        if found is not None:
            if found[1].asid != self.asid:
                raise FirmwareError("RMPUPDATE", "FAIL_PERMISSION", pfn=block.pfn, owner=found[1].asid)
            if found[1].large and not block.order:
                self._smash(found[0])
            return
        self._assign(gfn, block)

    def make_shared(self, blocks: Sequence[Block]) -> None:
        """PSMASH wherever an entry is larger than what leaves; then RMPUPDATE of each, and the host sees ciphertext. If
        one fails those before it are assigned again, with their bytes: what the guest had validated it must validate
        again."""
        for block in blocks:
            self._smash_what_sticks_out(block)
        taken: list[tuple[Entry, Block]] = []
        try:
            for block in blocks:
                for entry, part in self._entries(block):
                    self._take(entry, part)
                    taken.append((entry, part))
        except FirmwareError:
            for entry, part in reversed(taken):
                with suppress(FirmwareError):  # then it is the host's in a private file until the next fault
                    self._assign(entry.gfn, part)
            raise

    def reclaim(self, block: Block) -> None:
        """As make_shared: nobody needs scrub ciphertext. Source: sev_gmem_invalidate."""
        self.make_shared([block])

    def invalidate(self, gfn: int, pages: int) -> None:
        """RMP entries do not follow the leaves."""

    def split(self, gfn: int, order: int) -> None:
        """PSMASH of the large entry at a frame, in answer to a guest's size mismatch."""
        for base, entry in self.platform.rmp.entries():
            if entry.asid == self.asid and entry.large and entry.gfn == gfn:
                self._smash(base)
                return
        raise FirmwareError("PSMASH", "FAIL_INPUT", gfn=gfn)

    def merge(self, gfn: int, order: int) -> None:
        """Not without the guest's help: small entries stay. Source: APM volume 2, 15.36.11."""
        raise FirmwareError("RMPUPDATE", "FAIL_OVERLAP", gfn=gfn)

    def check_access(self, gfn: int, pfn: Pfn, order: int, write: bool) -> bool:
        """Table 15-39, for a data access with the C-bit at VMPL0; a guest that accepts lazily validates first."""
        rmp, large = self.platform.rmp, bool(order)
        need = READ | WRITE if write else READ
        fault = rmp.check_guest(self.asid, gfn, pfn, leaf_large=large, need=need)
        if fault is Fault.NOT_VALIDATED and self.platform.guests_validate:
            found = rmp.lookup(pfn)
            assert found is not None
            rmp.pvalidate(self.asid, found[1].gfn, found[0], large=large, validate=True)
            fault = rmp.check_guest(self.asid, gfn, pfn, leaf_large=large, need=need)
        return fault is None

    # Launch

    def start(self, parameters: int | None = None) -> None:
        """GCTX_CREATE, LAUNCH_START with a policy, ACTIVATE; whatever fails, the context does not stay behind (known
        bug B41)."""
        policy = DEFAULT_POLICY if parameters is None else parameters
        if self.context is not None:
            raise FirmwareError("SNP_LAUNCH_START", SevStatus.INVALID_GUEST_STATE.name)
        firmware = self.platform.firmware
        context = firmware.gctx_create()
        if isinstance(context, SevStatus):
            error = FirmwareError("SNP_GCTX_CREATE", context.name)
            error.answer = errno.ENOTTY
            raise error
        status = firmware.launch_start(context, policy)
        call = "SNP_LAUNCH_START"
        if status is SevStatus.SUCCESS:
            status = self._activate(context)
            call = "SNP_ACTIVATE"
        if status is SevStatus.SUCCESS:
            self.context = context
            return
        if firmware.decommission(context) is not SevStatus.SUCCESS:
            self.context = context  # of no use, but teardown tries again
        raise FirmwareError(call, status.name, asid=self.asid, policy=policy)

    def populate(self, gfn: int, block: Block, source: bytes | None, kind: int = 0) -> None:
        """The page becomes firmware's, then SNP_LAUNCH_UPDATE makes it the guest's. On failure it is the host's again
        and a CPUID page's correction is in the error; a page that firmware does not give back stays firmware's, and
        nobody can use it until it leaves the file. Source: sev_gmem_post_populate."""
        page_type = PageType(kind or PageType.NORMAL)
        context = self._launched("SNP_LAUNCH_UPDATE")
        rmp = self.platform.rmp
        if rmp.lookup(block.pfn) is not None:
            raise FirmwareError("SNP_LAUNCH_UPDATE", SevStatus.INVALID_PAGE_STATE.name, pfn=block.pfn)
        before = read_host(block.hva, PAGE_SIZE)
        if page_type is PageType.ZERO:
            write_host(block.hva, bytes(PAGE_SIZE))
        elif source is not None:
            write_host(block.hva, source)
        contents = read_host(block.hva, PAGE_SIZE)
        try:
            self._update(block.pfn, State(True, self.asid, gfn, immutable=True))
            status, corrected = self.platform.firmware.launch_update(context, gfn, block.pfn, page_type, contents)
            if status is not SevStatus.SUCCESS:
                try:
                    self._page_reclaim(block.pfn)
                    self._update(block.pfn, State())
                except FirmwareError as stuck:
                    raise FirmwareError("SNP_LAUNCH_UPDATE", status.name, gfn=gfn, stuck=stuck.call) from stuck
                raise FirmwareError("SNP_LAUNCH_UPDATE", status.name, corrected, gfn=gfn)
        except FirmwareError:
            if rmp.lookup(block.pfn) is None:
                write_host(block.hva, before)
            raise

    def corrects(self, kind: int) -> bool:
        return kind == PageType.CPUID

    def finalize(self, vcpu_states: Mapping[int, bytes], parameters: LaunchFinish | None = None) -> bytes:
        """VMSAs, in the order of the vCPUs, then SNP_LAUNCH_FINISH; the launch digest."""
        context = self._launched("SNP_LAUNCH_FINISH")
        before = context.digest
        try:
            self.vcpus.launch(context, vcpu_states, self.vmsa_features)
            status = self.platform.firmware.launch_finish(context, parameters or NO_ID_BLOCK)
            if status is not SevStatus.SUCCESS:
                self.vcpus.take_back()
                raise FirmwareError("SNP_LAUNCH_FINISH", status.name, asid=self.asid)
        except FirmwareError:
            context.digest = before
            raise
        return context.digest

    # vCPUs

    @property
    def state_pages(self) -> SnpVcpus:
        return self.vcpus

    @property
    def inside(self) -> set[int]:
        return self.vcpus.inside

    def enter(self, vcpu: int) -> None:
        self.vcpus.enter(vcpu)

    def leave(self, vcpu: int) -> None:
        self.vcpus.leave(vcpu)

    def execute(self, instruction: GuestInstruction, leaf: tuple[Pfn, int] | None) -> Outcome:
        return execute(self.platform.rmp, self.asid, instruction, leaf)

    def teardown(self) -> bool:
        """DECOMMISSION, once. If it fails, or a page could not be taken back, the ASID is never used again. Source:
        sev_vm_destroy, snp_decommission_context."""
        assert not self.ended, "S8: a guest is torn down twice"
        self.ended = True
        self.vcpus.take_back()
        if self.context is not None and self.platform.firmware.decommission(self.context) is not SevStatus.SUCCESS:
            self.platform.lost_contexts += 1
            return False
        return not any(entry.asid == self.asid for _, entry in self.platform.rmp.entries())

    def _activate(self, context: Context) -> SevStatus:
        """An ASID that a guest had before is dirty: flush first. Source: sev_flush_asids."""
        firmware = self.platform.firmware
        status = firmware.activate(context, self.asid)
        if status is SevStatus.DFFLUSH_REQUIRED:
            flushed = firmware.df_flush()
            status = firmware.activate(context, self.asid) if flushed is SevStatus.SUCCESS else flushed
        return status

    def _launched(self, call: str) -> Context:
        if self.context is None:
            raise FirmwareError(call, SevStatus.INVALID_GUEST.name, asid=self.asid)
        return self.context

    def _assign(self, gfn: int, block: Block) -> None:
        """The block is in one entry; the guest sees decrypted what is in memory."""
        self._update(block.pfn, State(True, self.asid, gfn, large=bool(block.order)))
        for pfn, hva in _pages(block):
            write_host(hva, self._key.decrypt(pfn, read_host(hva, PAGE_SIZE)))

    def _take(self, entry: Entry, block: Block) -> None:
        """The block, which is all of an entry, is the host's."""
        if entry.immutable:
            self._page_reclaim(block.pfn)
        self._update(block.pfn, State(large=entry.large))
        for pfn, hva in _pages(block):
            write_host(hva, self._key.encrypt(pfn, read_host(hva, PAGE_SIZE)))

    def _smash_what_sticks_out(self, block: Block) -> None:
        """A large entry may begin before the block or end after it: at its first page, and at its last."""
        for pfn in (block.pfn, Pfn(block.pfn + block.pages - 1)):
            found = self.platform.rmp.lookup(pfn)
            if found is None or not found[1].large or found[1].asid != self.asid:
                continue
            if found[0] < block.pfn or found[0] + (1 << self.platform.rmp.large_order) > block.pfn + block.pages:
                self._smash(found[0])

    def _entries(self, block: Block) -> list[tuple[Entry, Block]]:
        """This guest's entries inside a block, each with what it speaks for."""
        found = []
        for pfn, hva in _pages(block):
            at = self.platform.rmp.lookup(pfn)
            if at is not None and at[0] == pfn and at[1].asid == self.asid:
                found.append((at[1], Block(pfn, self.platform.rmp.large_order if at[1].large else 0, hva)))
        return found

    def _all_free(self, block: Block) -> bool:
        return all(self.platform.rmp.lookup(pfn) is None for pfn, _ in _pages(block))

    def _update(self, pfn: Pfn, state: State) -> None:
        status = self.platform.rmp.rmpupdate(pfn, state)
        if status is not Status.SUCCESS:
            raise FirmwareError("RMPUPDATE", status.name, pfn=pfn)
        if not state.assigned:
            self.dma.followers.tell(pfn, 1 << self.platform.rmp.large_order if state.large else 1)

    def _page_reclaim(self, pfn: Pfn) -> None:
        status = self.platform.firmware.page_reclaim(pfn)
        if status is not SevStatus.SUCCESS:
            raise FirmwareError("SNP_PAGE_RECLAIM", status.name, pfn=pfn)

    def _smash(self, base: Pfn) -> None:
        status = self.platform.rmp.psmash(base)
        if status is not Status.SUCCESS:
            raise FirmwareError("PSMASH", status.name, pfn=base)
        self.dma.followers.tell(base, 1 << self.platform.rmp.large_order)


def _pages(block: Block) -> Iterator[tuple[Pfn, int]]:
    for number in range(block.pages):
        yield Pfn(block.pfn + number), block.hva + (number << PAGE_SHIFT)
