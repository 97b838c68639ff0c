"""Arm CCA as KVM sees it: a realm for each virtual machine; granules are delegated to the monitor and become its pages.

Guest code here makes no RSI calls: the realm is one that declares each page to be RAM when it first touches it. As on
TDX a page is the realm's exactly as long as its leaf is there, under every policy (Lifetime).

Source: arch/arm64/kvm/rme.c of "[PATCH v15] arm64: Support for Arm CCA in KVM"; spec/semantics.md section 15.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from guestmem.arch.architecture import UNDEFINED, FirmwareError, GuestInstruction, Outcome, Owner
from guestmem.arch.cca.dma import CcaDma
from guestmem.arch.cca.monitor import Monitor
from guestmem.arch.cca.realm import (
    LEVEL_2M,
    LEVEL_4K,
    LEVEL_ROOT,
    GranuleState,
    Hipas,
    Realm,
    RealmState,
    Ripas,
    Rtte,
    frames,
)
from guestmem.arch.dma import Block
from guestmem.memory import PAGE_SIZE, Pfn, read_host

NOT_MEASURED = 1
"""Kind of a page that is put into the realm and not measured: RMI_NO_MEASURE_CONTENT."""
_FIRST_OWN = 1 << 40


class CcaPlatform:
    """A machine with the RMM. Granules for its tables come from memory that no guest_memfd has."""

    name = "CCA"
    has_private_memory = True

    def __init__(self, *, fails: Callable[[str], bool] | None = None) -> None:
        self.monitor = Monitor(fails)
        self.data: dict[Pfn, tuple[CcaGuest, int]] = {}  # DATA granules: whose, at which frame
        self.lost: set[Pfn] = set()  # realms that could not be destroyed, by RD
        self._free: list[Pfn] = []
        self._next = _FIRST_OWN

    def new_guest(self, number: int, generation: int) -> CcaGuest:
        return CcaGuest(self, number, generation)

    def take_granule(self) -> Pfn:
        """A delegated granule for a table."""
        if self._free:
            pfn = self._free.pop()
        else:
            pfn, self._next = Pfn(self._next), self._next + 1
        try:
            self.monitor.granule_delegate(pfn)
        except FirmwareError:
            self._free.append(pfn)
            raise
        return pfn

    def give_back(self, pfn: Pfn) -> None:
        self.monitor.granule_undelegate(pfn)
        self._free.append(pfn)

    def owner(self, pfn: Pfn) -> Owner | None:
        """A granule that is delegated and nobody's is not the host's either: it has the frame None."""
        found = self.data.get(pfn)
        if found is None:
            return None
        guest, gfn = found
        delegated_only = self.monitor.state(pfn) is not GranuleState.DATA
        return Owner(guest.number, guest.generation, None if delegated_only else gfn)

    def owned(self) -> Iterable[tuple[Pfn, Owner]]:
        for pfn in self.data:
            owner = self.owner(pfn)
            assert owner is not None
            yield pfn, owner

    def live_guests(self) -> int:
        return len(self.monitor.realms.keys() - self.lost)

    def host_read(self, pfn: Pfn, hva: int) -> bytes:
        """Raises: FirmwareError, a granule protection fault, for a granule that is not the host's."""
        if self.monitor.state(pfn) is not GranuleState.UNDELEGATED:
            raise FirmwareError("GPT", "granule protection fault", pfn=pfn)
        return read_host(hva, PAGE_SIZE)


class CcaGuest:
    """A realm. It exists from `start` on; `number` is its VMID."""

    has_tables = True
    page_bit = None
    state_pages = None
    has_vcpus = True

    def __init__(self, platform: CcaPlatform, number: int, generation: int) -> None:
        self.number = number
        self.generation = generation
        self.rd = Pfn(0)
        self.recs: dict[int, Pfn] = {}
        self.inside: set[int] = set()
        self.dma = CcaDma(self, platform)
        self._platform = platform
        self._monitor = platform.monitor

    @property
    def realm(self) -> Realm | None:
        return self._monitor.realms.get(self.rd)

    @property
    def launched(self) -> bool:
        realm = self.realm
        return realm is not None and realm.state is RealmState.ACTIVE

    # Launch

    def start(self, parameters: int | None = None) -> None:
        """RMI_REALM_CREATE."""
        if self.rd:
            raise FirmwareError("RMI_REALM_CREATE", "RMI_ERROR_INPUT", rd=self.rd)
        granules: list[Pfn] = []
        try:
            for _ in range(2):
                granules.append(self._platform.take_granule())
            self._monitor.realm_create(granules[0], granules[1], (parameters or 0).to_bytes(8, "little"))
        except FirmwareError:
            for granule in granules:
                self._platform.give_back(granule)
            raise
        self.rd = granules[0]

    def populate(self, gfn: int, block: Block, source: bytes | None, kind: int = 0) -> None:
        """KVM_ARM_RMI_POPULATE for one page: RTT_INIT_RIPAS, GRANULE_DELEGATE, DATA_CREATE."""
        monitor = self._monitor
        self._add_tables(gfn)
        realm = self.realm
        if realm is None or realm.get(gfn, LEVEL_4K).ripas is not Ripas.RAM:
            monitor.rtt_init_ripas(self.rd, gfn)
        content = source if source is not None else read_host(block.hva, PAGE_SIZE)
        monitor.granule_delegate(block.pfn)
        try:
            monitor.data_create(self.rd, block.pfn, gfn, block.hva, content, kind != NOT_MEASURED)
        except FirmwareError:
            self._undelegate(block.pfn, block.hva)
            raise
        self._platform.data[block.pfn] = (self, gfn)

    def corrects(self, kind: int) -> bool:
        return False

    def finalize(self, vcpu_states: Mapping[int, bytes], parameters: object = None) -> bytes:
        """RMI_REC_CREATE for each vCPU, then RMI_REALM_ACTIVATE; the realm's initial measurement (RIM)."""
        for vcpu, state in vcpu_states.items():
            if vcpu in self.recs:  # of an attempt that failed later
                continue
            granule = self._platform.take_granule()
            try:
                self._monitor.rec_create(self.rd, granule, state)
            except FirmwareError:
                self._platform.give_back(granule)
                raise
            self.recs[vcpu] = granule
        self._monitor.realm_activate(self.rd)
        return self._monitor.realms[self.rd].measurement

    # vCPUs

    def enter(self, vcpu: int) -> None:
        """RMI_REC_ENTER. A vCPU that was made after the launch has no REC."""
        rec = self.recs.get(vcpu)
        if rec is None:
            raise FirmwareError("RMI_REC_ENTER", "RMI_ERROR_INPUT", no_vcpu=True)
        self._monitor.rec_enter(self.rd, rec)
        self.inside.add(vcpu)

    def leave(self, vcpu: int) -> None:
        """The return of RMI_REC_ENTER."""
        if vcpu in self.inside:
            self._monitor.rec_exit(self.rd, self.recs[vcpu])
            self.inside.remove(vcpu)

    # Pages

    def leaf_order(self, gfn: int, block: Block) -> int:
        """What the RTT has for the frame already, else what the block allows, up to 2M."""
        realm = self.realm
        if realm is None:
            return 0
        reached, entry = realm.walk(gfn, LEVEL_4K)
        if entry.hipas is Hipas.ASSIGNED:
            return min(9 * (LEVEL_4K - reached), block.order)
        return 0 if reached == LEVEL_4K or block.order < 9 else 9

    def make_private(self, gfn: int, block: Block) -> None:
        """GRANULE_DELEGATE and DATA_CREATE_UNKNOWN of each page, RTT_FOLD of a block; RSI_IPA_STATE_SET by the realm.
        All or none."""
        monitor, realm = self._monitor, self.realm
        if realm is None:
            raise FirmwareError("RMI_DATA_CREATE_UNKNOWN", "RMI_ERROR_INPUT", rd=self.rd)
        reached, entry = realm.walk(gfn, LEVEL_4K)
        if entry.hipas is Hipas.ASSIGNED and entry.pfn + gfn % frames(reached) == block.pfn:
            return
        self._add_tables(gfn)
        made = 0
        try:
            for made in range(block.pages):
                self._create(gfn + made, Pfn(block.pfn + made), block.hva + made * PAGE_SIZE)
        except FirmwareError:
            if made:
                self.invalidate(gfn, made)
            raise
        if block.order:
            self._platform.give_back(monitor.rtt_fold(self.rd, gfn, LEVEL_4K))

    def make_shared(self, blocks: Sequence[Block]) -> None:
        """RMI_RTT_CREATE, to have every page in an entry of its own, then what `reclaim` does. DATA_DESTROY cannot be
        undone: what was destroyed before a granule fails is lost, and so is what was in that granule."""
        for block in blocks:
            self._unfold(block)
        for block in blocks:
            self.reclaim(block)

    def reclaim(self, block: Block) -> None:
        """Nothing, after the zap; pages that no leaf of KVM's ever showed are destroyed now. A granule that could not
        be undelegated is tried again."""
        for number in range(block.pages):
            pfn = Pfn(block.pfn + number)
            owner = self._platform.owner(pfn)
            if owner is None:
                continue
            if owner.gfn is not None:
                self.invalidate(owner.gfn, 1)
            else:
                self._undelegate(pfn, block.hva + number * PAGE_SIZE)
                del self._platform.data[pfn]

    def invalidate(self, gfn: int, pages: int) -> None:
        """DATA_DESTROY and GRANULE_UNDELEGATE of each page; blocks are unfolded first."""
        failed: FirmwareError | None = None
        realm = self.realm
        if realm is None:
            return
        for at, level in list(_leaves(realm, gfn, pages)):
            if level == LEVEL_2M:
                self.split(at, 9)
            first, last = max(gfn, at), min(gfn + pages, at + frames(level))
            for page in range(first, last):
                try:
                    self._destroy(page, realm.get(page, LEVEL_4K))
                except FirmwareError as error:
                    error.facts.setdefault("gfn", page)
                    failed = failed or error
        if failed is not None:
            raise failed

    def split(self, gfn: int, order: int) -> None:
        """RMI_RTT_CREATE under the block: unfolded."""
        granule = self._platform.take_granule()
        try:
            self._monitor.rtt_create(self.rd, granule, gfn, LEVEL_4K - order // 9 + 1)
        except FirmwareError:
            self._platform.give_back(granule)
            raise

    def merge(self, gfn: int, order: int) -> None:
        """RMI_RTT_FOLD."""
        self._platform.give_back(self._monitor.rtt_fold(self.rd, gfn, LEVEL_4K - order // 9 + 1))

    def check_access(self, gfn: int, pfn: Pfn, order: int, write: bool) -> bool:
        realm = self.realm
        if realm is None:
            return False
        reached, entry = realm.walk(gfn, LEVEL_4K)
        assigned = entry.hipas is Hipas.ASSIGNED and entry.ripas is Ripas.RAM
        return assigned and entry.pfn + gfn % frames(reached) == pfn

    # The end

    def execute(self, instruction: GuestInstruction, leaf: tuple[Pfn, int] | None) -> Outcome:
        return UNDEFINED

    def teardown(self) -> bool:
        """Data, tables from the leaves up, RECs, the realm. False if a call failed: granules stay lost then."""
        realm = self.realm
        if realm is None:
            return True
        try:
            for level in (LEVEL_2M, LEVEL_4K):
                for index, entry in list(realm.tables[level].items()):
                    if entry.hipas is Hipas.ASSIGNED:
                        self.invalidate(index * frames(level), frames(level))
            for level in range(LEVEL_4K, LEVEL_ROOT, -1):
                for index, entry in list(realm.tables[level - 1].items()):
                    if entry.hipas is Hipas.TABLE:
                        self._platform.give_back(self._monitor.rtt_destroy(self.rd, index * frames(level - 1), level))
            for rec in list(realm.recs):
                self._monitor.rec_destroy(self.rd, rec)
                self._platform.give_back(rec)
            self._monitor.realm_destroy(self.rd)
            self._platform.give_back(realm.root)
            self._platform.give_back(self.rd)
        except FirmwareError:
            self._platform.lost.add(self.rd)
            return False
        self.rd = Pfn(0)
        self.recs.clear()
        return not any(guest is self for guest, _ in self._platform.data.values())

    # Parts

    def _add_tables(self, gfn: int) -> None:
        """RMI_RTT_CREATE of each table that is missing above a page."""
        realm = self.realm
        if realm is None:
            return
        for level in range(LEVEL_ROOT + 1, LEVEL_4K + 1):
            if realm.get(gfn, level - 1).hipas is Hipas.UNASSIGNED:
                granule = self._platform.take_granule()
                try:
                    self._monitor.rtt_create(self.rd, granule, gfn - gfn % frames(level - 1), level)
                except FirmwareError:
                    self._platform.give_back(granule)
                    raise

    def _unfold(self, block: Block) -> None:
        realm = self.realm
        for pfn in range(block.pfn, block.pfn + block.pages) if realm is not None else ():
            owner = self._platform.owner(Pfn(pfn))
            if owner is None or owner.gfn is None or realm is None:
                continue
            if realm.get(owner.gfn, LEVEL_2M).hipas is Hipas.ASSIGNED:
                self.split(owner.gfn - owner.gfn % frames(LEVEL_2M), 9)

    def _create(self, gfn: int, pfn: Pfn, hva: int) -> None:
        self._monitor.granule_delegate(pfn)
        try:
            self._monitor.data_create_unknown(self.rd, pfn, gfn, hva)
        except FirmwareError:
            self._undelegate(pfn, hva)
            raise
        self._platform.data[pfn] = (self, gfn)
        self._monitor.ipa_state_set_ram(self.rd, gfn)

    def _destroy(self, gfn: int, entry: Rtte) -> None:
        self._monitor.data_destroy(self.rd, gfn)
        self.dma.followers.tell(entry.pfn, 1)
        self._undelegate(entry.pfn, entry.hva)
        del self._platform.data[entry.pfn]

    def _undelegate(self, pfn: Pfn, hva: int) -> None:
        self._monitor.granule_undelegate(pfn, hva)


def _leaves(realm: Realm, gfn: int, pages: int) -> Iterable[tuple[int, int]]:
    """The leaves over some frames: first frame and level. Looks at the fewer: frames, or what the realm has."""
    for level in (LEVEL_2M, LEVEL_4K):
        first, last = gfn // frames(level), (gfn + pages - 1) // frames(level)
        entries = realm.tables[level]
        few = range(first, last + 1) if last - first < len(entries) else sorted(entries)
        for index in few:
            entry = entries.get(index)
            if entry is not None and first <= index <= last and entry.hipas is Hipas.ASSIGNED:
                yield index * frames(level), level
