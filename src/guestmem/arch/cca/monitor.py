"""The calls of the Realm Management Monitor: granules between host and realms, realms, RECs, realm translation tables.

Checks stand in the specification's order of failure conditions where it gives one, and a call that fails changes
nothing. An error in the walk names the level it reached: RMI_ERROR_RTT(2).

Source: Realm Management Monitor specification 1.0 (DEN0137), RMI commands; TF-RMM runtime/rmi: rtt.c, granule.c,
realm.c, rec.c, run.c. From memory: the layout of the parameters that the first measurement is of (here the policy
only).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from guestmem.arch.architecture import FirmwareError
from guestmem.arch.cca.realm import (
    EMPTY,
    LEVEL_4K,
    LEVEL_ROOT,
    PROTECTED_FRAMES,
    GranuleState,
    Hipas,
    Realm,
    RealmState,
    Ripas,
    Rtte,
    frames,
)
from guestmem.memory import PAGE_SHIFT, PAGE_SIZE, Pfn, read_host, write_host

_DATA, _REC, _RIPAS = 0, 1, 2  # kinds of measurement descriptors


class Monitor:
    """`fails(name)` true makes the call of that name end with RMI_ERROR_INPUT: EL3 could not change the GPT."""

    def __init__(self, fails: Callable[[str], bool] | None = None) -> None:
        self.granules: dict[Pfn, GranuleState] = {}  # that are not UNDELEGATED
        self.realms: dict[Pfn, Realm] = {}  # by RD
        self._fails = fails or (lambda _: False)

    def state(self, pfn: Pfn) -> GranuleState:
        return self.granules.get(pfn, GranuleState.UNDELEGATED)

    # Granules

    def granule_delegate(self, pfn: Pfn) -> None:
        """RMI_GRANULE_DELEGATE: into the Realm address space of the GPT."""
        call = "RMI_GRANULE_DELEGATE"
        self._granule(call, pfn, GranuleState.UNDELEGATED)
        self.granules[pfn] = GranuleState.DELEGATED

    def granule_undelegate(self, pfn: Pfn, hva: int | None = None) -> None:
        """RMI_GRANULE_UNDELEGATE: wiped, and back to the host. `hva`: where its bytes are, if anybody can see them."""
        call = "RMI_GRANULE_UNDELEGATE"
        self._granule(call, pfn, GranuleState.DELEGATED)
        if hva is not None:
            write_host(hva, bytes(PAGE_SIZE))
        del self.granules[pfn]

    # Realms and RECs

    def realm_create(self, rd: Pfn, root: Pfn, parameters: bytes = b"") -> Realm:
        call = "RMI_REALM_CREATE"
        self._granule(call, rd, GranuleState.DELEGATED)
        if rd == root:
            raise FirmwareError(call, "RMI_ERROR_INPUT", rd=rd, rtt=root)
        self._granule(call, root, GranuleState.DELEGATED)
        self.granules[rd], self.granules[root] = GranuleState.RD, GranuleState.RTT
        realm = self.realms[rd] = Realm(rd, root, parameters)
        return realm

    def realm_activate(self, rd: Pfn) -> None:
        call = "RMI_REALM_ACTIVATE"
        self._realm(call, rd, RealmState.NEW).state = RealmState.ACTIVE

    def realm_destroy(self, rd: Pfn) -> None:
        """RMI_REALM_DESTROY: only what has no REC and no live entry in its root table."""
        call = "RMI_REALM_DESTROY"
        realm = self._realm(call, rd)
        live = sum(entry.hipas is not Hipas.UNASSIGNED for entry in realm.tables[LEVEL_ROOT].values())
        if realm.recs or live:
            raise FirmwareError(call, "RMI_ERROR_REALM", recs=len(realm.recs), live=live)
        self.granules[rd] = self.granules[realm.root] = GranuleState.DELEGATED
        del self.realms[rd]

    def rec_create(self, rd: Pfn, rec: Pfn, parameters: bytes = b"") -> None:
        call = "RMI_REC_CREATE"
        self._granule(call, rec, GranuleState.DELEGATED)
        realm = self._realm(call, rd, RealmState.NEW)
        self.granules[rec] = GranuleState.REC
        realm.recs.append(rec)
        realm.extend(_REC, hashlib.sha256(parameters).digest())

    def rec_enter(self, rd: Pfn, rec: Pfn) -> None:
        """RMI_REC_ENTER, as far as it can be refused; `rec_exit` is its return."""
        call = "RMI_REC_ENTER"
        if self.state(rec) is not GranuleState.REC:
            raise FirmwareError(call, "RMI_ERROR_INPUT", pfn=rec, state=self.state(rec).value)
        realm = self._realm(call, rd)
        if realm.state is not RealmState.ACTIVE:
            raise FirmwareError(call, "RMI_ERROR_REALM", state=realm.state.value)
        if rec in realm.running:
            raise FirmwareError(call, "RMI_ERROR_REC", running=True)
        realm.running.add(rec)

    def rec_exit(self, rd: Pfn, rec: Pfn) -> None:
        self.realms[rd].running.discard(rec)

    def rec_destroy(self, rd: Pfn, rec: Pfn) -> None:
        call = "RMI_REC_DESTROY"
        self._granule(call, rec, GranuleState.REC)
        realm = self._realm(call, rd)
        if rec in realm.running:
            raise FirmwareError(call, "RMI_ERROR_REC", running=True)
        realm.recs.remove(rec)
        self.granules[rec] = GranuleState.DELEGATED

    # Translation tables

    def rtt_create(self, rd: Pfn, rtt: Pfn, gfn: int, level: int) -> None:
        """RMI_RTT_CREATE: a granule becomes the table whose entries are of `level`. A block there is unfolded."""
        call = "RMI_RTT_CREATE"
        self._granule(call, rtt, GranuleState.DELEGATED)
        realm = self._realm(call, rd)
        parent = self._parent(call, realm, gfn, level)
        if parent.hipas is Hipas.TABLE:
            raise self._rtt_error(call, level - 1, gfn=gfn)
        self.granules[rtt] = GranuleState.RTT
        realm.set(gfn, level - 1, Rtte(Hipas.TABLE, Ripas.EMPTY, rtt))
        if parent == EMPTY:
            return
        for number in range(512):
            step = number * frames(level)
            pfn, hva = parent.pfn, parent.hva
            if parent.hipas is Hipas.ASSIGNED:
                pfn, hva = Pfn(pfn + step), hva + (step << PAGE_SHIFT)
            realm.set(gfn + step, level, Rtte(parent.hipas, parent.ripas, pfn, hva))

    def rtt_destroy(self, rd: Pfn, gfn: int, level: int) -> Pfn:
        """RMI_RTT_DESTROY: a table without live entries is a delegated granule again, its range DESTROYED."""
        call = "RMI_RTT_DESTROY"
        realm = self._realm(call, rd)
        parent = self._parent(call, realm, gfn, level)
        if parent.hipas is not Hipas.TABLE:
            raise self._rtt_error(call, level - 1, gfn=gfn)
        if any(entry.hipas is not Hipas.UNASSIGNED for entry in realm.children(gfn, level)):
            raise self._rtt_error(call, level, gfn=gfn)
        realm.drop_children(gfn, level)
        realm.set(gfn, level - 1, Rtte(Hipas.UNASSIGNED, Ripas.DESTROYED))
        self.granules[parent.pfn] = GranuleState.DELEGATED
        return parent.pfn

    def rtt_fold(self, rd: Pfn, gfn: int, level: int) -> Pfn:
        """RMI_RTT_FOLD: a table whose 512 entries say the same becomes an entry one level up."""
        call = "RMI_RTT_FOLD"
        realm = self._realm(call, rd)
        parent = self._parent(call, realm, gfn, level)
        if parent.hipas is not Hipas.TABLE:
            raise self._rtt_error(call, level - 1, gfn=gfn)
        entries = realm.children(gfn, level)
        first = entries[0]
        if first.hipas is Hipas.TABLE or any((e.hipas, e.ripas) != (first.hipas, first.ripas) for e in entries):
            raise self._rtt_error(call, level, gfn=gfn)
        if first.hipas is Hipas.ASSIGNED:
            step = frames(level)
            if level < LEVEL_4K:  # no block is larger than 2M
                raise self._rtt_error(call, level - 1, gfn=gfn)
            if first.pfn % (512 * step) or any(e.pfn != first.pfn + n * step for n, e in enumerate(entries)):
                raise self._rtt_error(call, level, gfn=gfn)
        realm.drop_children(gfn, level)
        realm.set(gfn, level - 1, first)
        self.granules[parent.pfn] = GranuleState.DELEGATED
        return parent.pfn

    # Pages

    def rtt_init_ripas(self, rd: Pfn, gfn: int, level: int = LEVEL_4K) -> None:
        """RMI_RTT_INIT_RIPAS for one entry: the realm will find RAM there. Measured; before activation."""
        call = "RMI_RTT_INIT_RIPAS"
        realm = self._realm(call, rd)
        reached, entry = self._protected(call, realm, gfn, level)
        self._realm(call, rd, RealmState.NEW)
        if reached != level or entry.hipas is not Hipas.UNASSIGNED or entry.ripas is Ripas.DESTROYED:
            raise self._rtt_error(call, reached, gfn=gfn)
        realm.set(gfn, level, entry._replace(ripas=Ripas.RAM))
        realm.extend(_RIPAS, gfn << PAGE_SHIFT, gfn + frames(level) << PAGE_SHIFT)

    def data_create(self, rd: Pfn, data: Pfn, gfn: int, hva: int, source: bytes | None, measure: bool = True) -> None:
        """RMI_DATA_CREATE: a delegated granule with the bytes of `source`, or its own; before activation."""
        call = "RMI_DATA_CREATE"
        self._granule(call, data, GranuleState.DELEGATED)
        realm = self._realm(call, rd)
        reached, entry = self._protected(call, realm, gfn, LEVEL_4K)
        if realm.state is not RealmState.NEW:
            raise FirmwareError(call, "RMI_ERROR_REALM", state=realm.state.value)
        if reached != LEVEL_4K or entry.hipas is not Hipas.UNASSIGNED or entry.ripas is not Ripas.RAM:
            raise self._rtt_error(call, reached, gfn=gfn, hipas=entry.hipas.value, ripas=entry.ripas.value)
        if source is not None:
            write_host(hva, source)
        self.granules[data] = GranuleState.DATA
        realm.set(gfn, LEVEL_4K, Rtte(Hipas.ASSIGNED, Ripas.RAM, data, hva))
        content = hashlib.sha256(read_host(hva, PAGE_SIZE)).digest() if measure else b""
        realm.extend(_DATA, gfn << PAGE_SHIFT, int(measure), content)

    def data_create_unknown(self, rd: Pfn, data: Pfn, gfn: int, hva: int) -> None:
        """RMI_DATA_CREATE_UNKNOWN: a delegated granule whose bytes are not the host's; TF-RMM zeroes it."""
        call = "RMI_DATA_CREATE_UNKNOWN"
        self._granule(call, data, GranuleState.DELEGATED)
        realm = self._realm(call, rd)
        reached, entry = self._protected(call, realm, gfn, LEVEL_4K)
        if reached != LEVEL_4K or entry.hipas is not Hipas.UNASSIGNED:
            raise self._rtt_error(call, reached, gfn=gfn, hipas=entry.hipas.value)
        write_host(hva, bytes(PAGE_SIZE))
        self.granules[data] = GranuleState.DATA
        realm.set(gfn, LEVEL_4K, Rtte(Hipas.ASSIGNED, entry.ripas, data, hva))

    def data_destroy(self, rd: Pfn, gfn: int) -> Pfn:
        """RMI_DATA_DESTROY: the granule is delegated; where there was RAM the realm is told that it was DESTROYED."""
        call = "RMI_DATA_DESTROY"
        realm = self._realm(call, rd)
        reached, entry = self._protected(call, realm, gfn, LEVEL_4K)
        if reached != LEVEL_4K or entry.hipas is not Hipas.ASSIGNED:
            raise self._rtt_error(call, reached, gfn=gfn, hipas=entry.hipas.value)
        ripas = Ripas.DESTROYED if entry.ripas is Ripas.RAM else entry.ripas
        realm.set(gfn, LEVEL_4K, Rtte(Hipas.UNASSIGNED, ripas))
        self.granules[entry.pfn] = GranuleState.DELEGATED
        return entry.pfn

    def ipa_state_set_ram(self, rd: Pfn, gfn: int) -> None:
        """RSI_IPA_STATE_SET by the realm, granted by the host with RMI_RTT_SET_RIPAS: this page is RAM."""
        call = "RMI_RTT_SET_RIPAS"
        realm = self._realm(call, rd)
        reached, entry = self._protected(call, realm, gfn, LEVEL_4K)
        if reached != LEVEL_4K and entry.ripas is not Ripas.RAM:
            raise self._rtt_error(call, reached, gfn=gfn)
        if reached == LEVEL_4K:
            realm.set(gfn, LEVEL_4K, entry._replace(ripas=Ripas.RAM))

    # Parts

    def _granule(self, call: str, pfn: Pfn, state: GranuleState) -> None:
        """Raises: FirmwareError RMI_ERROR_INPUT, unless the granule is in `state`."""
        if self._fails(call):
            raise FirmwareError(call, "RMI_ERROR_INPUT", pfn=pfn, gpt="not changed")
        if self.state(pfn) is not state:
            raise FirmwareError(call, "RMI_ERROR_INPUT", pfn=pfn, state=self.state(pfn).value)

    def _realm(self, call: str, rd: Pfn, state: RealmState | None = None) -> Realm:
        realm = self.realms.get(rd)
        if realm is None:
            raise FirmwareError(call, "RMI_ERROR_INPUT", pfn=rd, state=self.state(rd).value)
        if state is not None and realm.state is not state:
            raise FirmwareError(call, "RMI_ERROR_REALM", state=realm.state.value)
        return realm

    def _protected(self, call: str, realm: Realm, gfn: int, level: int) -> tuple[int, Rtte]:
        """Walk to a protected frame. Raises: FirmwareError RMI_ERROR_INPUT for any other."""
        if not 0 <= gfn < PROTECTED_FRAMES or gfn % frames(level):
            raise FirmwareError(call, "RMI_ERROR_INPUT", gfn=gfn)
        return realm.walk(gfn, level)

    def _parent(self, call: str, realm: Realm, gfn: int, level: int) -> Rtte:
        """The entry that a table of `level` hangs from, or would."""
        if not LEVEL_ROOT < level <= LEVEL_4K or not 0 <= gfn < 2 * PROTECTED_FRAMES or gfn % frames(level - 1):
            raise FirmwareError(call, "RMI_ERROR_INPUT", gfn=gfn, level=level)
        reached, entry = realm.walk(gfn, level - 1)
        if reached != level - 1:
            raise self._rtt_error(call, reached, gfn=gfn)
        return entry

    def _rtt_error(self, call: str, level: int, **facts: object) -> FirmwareError:
        return FirmwareError(call, f"RMI_ERROR_RTT({level})", **facts)  # type: ignore[arg-type]
