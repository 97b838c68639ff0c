"""The vCPUs of a TD: a TDVPR each, which goes into the guest on the logical CPU of its number.

Source: arch/x86/kvm/vmx/tdx.c tdx_td_vcpu_init, tdx_vcpu_pre_run, tdx_vcpu_run, tdx_track.
"""

from __future__ import annotations

from guestmem.arch.architecture import FirmwareError
from guestmem.arch.tdx.lent_pages import LentPages
from guestmem.arch.tdx.memory_calls import MemoryCalls
from guestmem.memory import Pfn


class TdxVcpus:
    """`tdvprs` by number of the vCPU: of those that were initialised before the end of the launch."""

    def __init__(self, module: MemoryCalls, lent: LentPages) -> None:
        self.tdvprs: dict[int, Pfn] = {}
        self.inside: set[int] = set()
        self._module = module
        self._lent = lent

    def add(self, tdr: Pfn, vcpu: int) -> None:
        """KVM_TDX_INIT_VCPU: TDH.VP.CREATE and INIT. Nothing to do for one that an attempt made that failed later."""
        if vcpu in self.tdvprs:
            return

        def create(page: Pfn) -> None:
            self._module.vp_create(tdr, page)
            self._module.vp_init(tdr, page, vcpu)
            self.tdvprs[vcpu] = page

        self._lent.lend(create)

    def enter(self, tdr: Pfn, vcpu: int) -> None:
        """TDH.VP.ENTER. Raises: FirmwareError, with `no_vcpu` for one that was made after the launch."""
        tdvpr = self.tdvprs.get(vcpu)
        if tdvpr is None:
            raise FirmwareError("TDH.VP.ENTER", "VCPU_TD_STATE_UNINITIALIZED", no_vcpu=True)
        self._module.vp_enter(tdr, tdvpr, vcpu)
        self.inside.add(vcpu)

    def leave(self, tdr: Pfn, vcpu: int) -> None:
        """A TD exit."""
        if vcpu in self.inside:
            self._module.vp_exit(tdr, self.tdvprs[vcpu])
            self.inside.remove(vcpu)

    def track(self, tdr: Pfn) -> None:
        """TDH.MEM.TRACK, and whoever is inside leaves: it may hold what the last epoch mapped."""
        self._module.mem_track(tdr)
        for vcpu in list(self.inside):
            self.leave(tdr, vcpu)
