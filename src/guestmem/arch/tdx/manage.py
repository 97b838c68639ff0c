"""Calls for a TD's life: its key, its control structures, its vCPUs, its end. In order:

    TDH.MNG.CREATE -> KEY.CONFIG on every package -> ADDCX until the TDCS is whole -> MNG.INIT -> VP.CREATE, VP.INIT
    -> memory_calls.py: pages, measurement, MR.FINALIZE -> run
    -> VP.FLUSH of every vCPU -> MNG.VPFLUSHDONE -> PHYMEM.CACHE.WB on every package -> MNG.KEY.FREEID
    -> PHYMEM.PAGE.RECLAIM of every page, the TDR last

Checks stand in the module's order and a call that fails changes nothing. `fails(name)` true makes a call end with
TDX_OPERAND_BUSY, as it does when another CPU holds what it needs.

Source: TDX module ABI specification; intel/tdx-module src/vmm_dispatcher/api_calls/tdh_mng_*.c, tdh_vp_*.c,
tdh_phymem_*.c, include/auto_gen_2_0/op_state_lookup.c. Left out: TDH.VP.ADDCX (a vCPU is one page here), migration,
nested guests; of the parameters of MNG.INIT all but what `parameters.py` has.
"""

from __future__ import annotations

import enum
from collections.abc import Callable

from guestmem.arch.tdx.pamt import PageType, Pamt, PamtEntry
from guestmem.arch.tdx.parameters import DEFAULT_PARAMS, TdParams, check
from guestmem.arch.tdx.status import Operand, Status, TdxError
from guestmem.arch.tdx.td import Lifecycle, OpState, Td, TdVcpu
from guestmem.memory import Pfn

TDCS_PAGES = 4


class KeyState(enum.Enum):
    """State of an HKID in the key ownership table."""

    FREE = "HKID_FREE"
    ASSIGNED = "HKID_ASSIGNED"
    FLUSHED = "HKID_FLUSHED"


class Key:
    """An entry of the key ownership table (KOT). `unflushed` are the packages whose caches may still hold its lines."""

    def __init__(self) -> None:
        self.state = KeyState.FREE
        self.unflushed: set[int] = set()


class ManagementCalls:
    """`hkids` private key ids, numbered from 1; `packages` CPU packages."""

    def __init__(
        self,
        *,
        hkids: int = 63,
        packages: int = 1,
        dynamic_pamt: bool = False,
        fails: Callable[[str], bool] | None = None,
    ) -> None:
        self.packages = range(packages)
        self.hkids = range(1, hkids + 1)
        self.kot: dict[int, Key] = {}  # of HKIDs that are not free
        self.pamt = Pamt(dynamic_pamt)
        self.tds: dict[Pfn, Td] = {}
        self.poisoned: set[Pfn] = set()  # written through another key: a read through the TD's is a machine check
        self._fails = fails or (lambda _: False)

    # The TD's key

    def mng_create(self, tdr: Pfn, hkid: int) -> Td:
        """TDH.MNG.CREATE: a page becomes the TDR of a new TD with an HKID that is free."""
        call = "TDH.MNG.CREATE"
        self._busy(call, Operand.RCX)
        self.pamt.check_free(call, tdr, 0, Operand.RCX)
        key = self.kot.get(hkid, Key())
        if hkid not in self.hkids:
            raise TdxError(call, Status.OPERAND_INVALID, Operand.RDX, hkid=hkid)
        if key.state is not KeyState.FREE:
            raise TdxError(call, Status.HKID_NOT_FREE, hkid=hkid, state=key.state.value)
        key.state = KeyState.ASSIGNED
        self.kot[hkid] = key
        self.pamt.set(tdr, PamtEntry(PageType.TDR, tdr))
        td = self.tds[tdr] = Td(tdr, hkid)
        return td

    def mng_key_config(self, tdr: Pfn, package: int) -> None:
        """TDH.MNG.KEY.CONFIG, on a CPU of `package`: it makes a key for the HKID."""
        call = "TDH.MNG.KEY.CONFIG"
        td = self._td(call, tdr, Operand.RCX)
        self._lifecycle(call, td, Lifecycle.HKID_ASSIGNED)
        if package in td.configured_packages:
            raise TdxError(call, Status.KEY_CONFIGURED, package=package)
        td.configured_packages.add(package)
        if len(td.configured_packages) == len(self.packages):
            td.lifecycle = Lifecycle.KEYS_CONFIGURED

    def mng_vpflushdone(self, tdr: Pfn) -> None:
        """TDH.MNG.VPFLUSHDONE: no vCPU is associated any more; the HKID waits for the caches."""
        call = "TDH.MNG.VPFLUSHDONE"
        td = self._td(call, tdr, Operand.RCX)
        self._lifecycle(call, td, Lifecycle.HKID_ASSIGNED, Lifecycle.KEYS_CONFIGURED)
        associated = sum(vcpu.cpu is not None for vcpu in td.vcpus.values())
        if associated:
            raise TdxError(call, Status.FLUSHVP_NOT_DONE, associated=associated)
        key = self.kot[td.hkid]
        key.state = KeyState.FLUSHED
        key.unflushed = set(self.packages)
        td.lifecycle = Lifecycle.BLOCKED

    def phymem_cache_wb(self, package: int) -> None:
        """TDH.PHYMEM.CACHE.WB, on a CPU of `package`: its caches are written back."""
        call = "TDH.PHYMEM.CACHE.WB"
        self._busy(call, Operand.KOT)
        flushed = [key for key in self.kot.values() if key.state is KeyState.FLUSHED]
        if not flushed:
            raise TdxError(call, Status.NO_HKID_READY_TO_WBCACHE)
        for key in flushed:
            key.unflushed.discard(package)

    def mng_key_freeid(self, tdr: Pfn) -> None:
        """TDH.MNG.KEY.FREEID: the HKID may be given to another TD; the pages of this one may be reclaimed."""
        call = "TDH.MNG.KEY.FREEID"
        td = self._td(call, tdr, Operand.RCX)
        self._lifecycle(call, td, Lifecycle.BLOCKED)
        key = self.kot[td.hkid]
        if key.unflushed:
            raise TdxError(call, Status.WBCACHE_NOT_COMPLETE, packages=len(key.unflushed))
        del self.kot[td.hkid]
        td.lifecycle = Lifecycle.TEARDOWN

    # Its control structures

    def mng_addcx(self, tdr: Pfn, tdcx: Pfn) -> None:
        """TDH.MNG.ADDCX: one page more for the TDCS."""
        call = "TDH.MNG.ADDCX"
        td = self._td(call, tdr, Operand.RDX)
        if td.lifecycle is not Lifecycle.KEYS_CONFIGURED:
            raise TdxError(call, Status.TD_KEYS_NOT_CONFIGURED, state=td.lifecycle.value)
        if len(td.tdcx) == TDCS_PAGES:
            raise TdxError(call, Status.TDCX_NUM_INCORRECT, pages=len(td.tdcx))
        self.pamt.check_free(call, tdcx, 0, Operand.RCX)
        self._give(td, tdcx, PageType.TDCX)
        td.tdcx.append(tdcx)

    def mng_init(self, tdr: Pfn, params: TdParams = DEFAULT_PARAMS) -> None:
        """TDH.MNG.INIT: the TDCS is whole and says what the TD is like, the measurement begins."""
        call = "TDH.MNG.INIT"
        td = self._td(call, tdr, Operand.RCX)
        self._keys(call, td)
        if len(td.tdcx) < TDCS_PAGES:
            raise TdxError(call, Status.TDCS_NOT_ALLOCATED, pages=len(td.tdcx))
        self._op_state(call, td, OpState.UNINITIALIZED)
        check(call, params)
        td.params = params
        td.op_state = OpState.INITIALIZED

    def vp_create(self, tdr: Pfn, tdvpr: Pfn) -> None:
        """TDH.VP.CREATE: a page becomes a vCPU."""
        call = "TDH.VP.CREATE"
        td = self._td(call, tdr, Operand.RDX)
        self._keys(call, td)
        self._op_state(call, td, OpState.INITIALIZED)
        self.pamt.check_free(call, tdvpr, 0, Operand.RCX)
        self._give(td, tdvpr, PageType.TDVPR)
        td.vcpus[tdvpr] = TdVcpu(tdvpr)

    def vp_init(self, tdr: Pfn, tdvpr: Pfn, cpu: int) -> None:
        """TDH.VP.INIT on logical processor `cpu`, with which the vCPU is associated from then on."""
        call = "TDH.VP.INIT"
        td, vcpu = self._vcpu(call, tdr, tdvpr)
        self._op_state(call, td, OpState.INITIALIZED)
        if vcpu.initialized:
            raise TdxError(call, Status.VCPU_STATE_INCORRECT, vcpu=tdvpr)
        vcpu.initialized = True
        vcpu.cpu = cpu

    def vp_enter(self, tdr: Pfn, tdvpr: Pfn, cpu: int) -> None:
        """TDH.VP.ENTER: the vCPU goes into the guest, and counts as one that may cache what this epoch maps.

        Never busy: what would be in its way is another CPU in TRACK, for a moment, and KVM enters again.
        """
        call = "TDH.VP.ENTER"
        td, vcpu = self._vcpu(call, tdr, tdvpr, may_be_busy=False)
        self._op_state(call, td, OpState.RUNNABLE)
        if not vcpu.initialized or vcpu.epoch is not None:
            raise TdxError(call, Status.VCPU_STATE_INCORRECT, vcpu=tdvpr)
        if vcpu.cpu not in (None, cpu):
            raise TdxError(call, Status.VCPU_ASSOCIATED, cpu=vcpu.cpu)
        vcpu.cpu = cpu
        vcpu.epoch = td.epoch
        td.epoch_users[td.epoch & 1] += 1

    def vp_exit(self, tdr: Pfn, tdvpr: Pfn) -> None:
        """The vCPU leaves the guest; it stays associated."""
        td, vcpu = self._vcpu("TD exit", tdr, tdvpr, may_be_busy=False)
        if vcpu.epoch is not None:
            td.epoch_users[vcpu.epoch & 1] -= 1
            vcpu.epoch = None

    def vp_flush(self, tdr: Pfn, tdvpr: Pfn, cpu: int) -> None:
        """TDH.VP.FLUSH on `cpu`: it is dissociated."""
        call = "TDH.VP.FLUSH"
        _, vcpu = self._vcpu(call, tdr, tdvpr)
        if vcpu.cpu != cpu or vcpu.epoch is not None:
            raise TdxError(call, Status.VCPU_NOT_ASSOCIATED, cpu=cpu)
        vcpu.cpu = None

    # Its end

    def phymem_page_reclaim(self, pfn: Pfn) -> PageType:
        """TDH.PHYMEM.PAGE.RECLAIM: a page of a TD in teardown is the host's again; the TDR only as the last one."""
        call = "TDH.PHYMEM.PAGE.RECLAIM"
        self._busy(call, Operand.RCX)
        found = self.pamt.find(pfn)
        if found is None:
            raise TdxError(call, Status.PAGE_METADATA_INCORRECT, Operand.RCX, pfn=pfn)
        start, entry = found
        if start != pfn:
            raise TdxError(call, Status.OPERAND_INVALID, Operand.RCX, pfn=pfn, order=entry.order)
        td = self.tds[entry.owner]
        self._lifecycle(call, td, Lifecycle.TEARDOWN)
        if entry.type is PageType.TDR:
            if td.children:
                raise TdxError(call, Status.TD_ASSOCIATED_PAGES_EXIST, pages=td.children)
            del self.tds[pfn]
        else:
            td.children -= 1 << entry.order
        self.pamt.clear(pfn)
        self.poisoned.discard(pfn)
        return entry.type

    # Parts

    def _busy(self, call: str, operand: Operand) -> None:
        if self._fails(call):
            raise TdxError(call, Status.OPERAND_BUSY, operand)

    def _td(self, call: str, tdr: Pfn, operand: Operand, may_be_busy: bool = True) -> Td:
        if may_be_busy:
            self._busy(call, operand)
        td = self.tds.get(tdr)
        if td is None:
            raise TdxError(call, Status.PAGE_METADATA_INCORRECT, operand, pfn=tdr)
        return td

    def _vcpu(self, call: str, tdr: Pfn, tdvpr: Pfn, may_be_busy: bool = True) -> tuple[Td, TdVcpu]:
        td = self._td(call, tdr, Operand.RDX, may_be_busy)
        vcpu = td.vcpus.get(tdvpr)
        if vcpu is None:
            raise TdxError(call, Status.PAGE_METADATA_INCORRECT, Operand.RCX, pfn=tdvpr)
        self._keys(call, td)
        return td, vcpu

    def _lifecycle(self, call: str, td: Td, *allowed: Lifecycle) -> None:
        if td.lifecycle not in allowed:
            raise TdxError(call, Status.LIFECYCLE_STATE_INCORRECT, state=td.lifecycle.value)

    def _keys(self, call: str, td: Td) -> None:
        if td.lifecycle is not Lifecycle.KEYS_CONFIGURED:
            raise TdxError(call, Status.TD_KEYS_NOT_CONFIGURED, state=td.lifecycle.value)

    def _op_state(self, call: str, td: Td, *allowed: OpState) -> None:
        if td.op_state not in allowed:
            raise TdxError(call, Status.OP_STATE_INCORRECT, state=td.op_state.value)

    def _give(self, td: Td, pfn: Pfn, type_: PageType, order: int = 0) -> None:
        """The page is the module's now. It is written whole, through the new key, so no poison is left."""
        self.pamt.set(pfn, PamtEntry(type_, td.tdr, order))
        td.children += 1 << order
        self.poisoned.difference_update(range(pfn, pfn + (1 << order)) if order else (pfn,))
