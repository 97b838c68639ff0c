"""The vCPUs of an SNP guest as VMRUN knows them: a VMSA page each, in use while its vCPU is inside.

KVM allocates a page for each vCPU, from memory that no guest_memfd has; the end of the launch makes it the guest's, and
firmware measures it. A guest may have made another page of its own the VMSA of a vCPU.

Source: arch/x86/kvm/svm/sev.c snp_launch_update_vmsa, pre_sev_run, sev_free_vcpu.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from guestmem.arch.architecture import FirmwareError
from guestmem.arch.dma import Block
from guestmem.arch.snp.digest import VMSA_GPA, PageType
from guestmem.arch.snp.firmware import Context, Firmware, SevStatus
from guestmem.arch.snp.rmp import FIRST_OWN, Fault, Rmp, State, Status
from guestmem.arch.snp.vmsa import load, save, vmsa_page
from guestmem.cpu.registers import Regs, Sregs
from guestmem.memory import PAGE_SHIFT, PAGE_SIZE, Pfn, read_host, write_host

VMSA_GFN = VMSA_GPA >> PAGE_SHIFT


class OwnPages:
    """KVM's pages for VMSAs, numbered from 2**40 up; the last one given back is the next one taken."""

    def __init__(self) -> None:
        self._next = FIRST_OWN
        self._free: list[Pfn] = []

    @property
    def count(self) -> int:
        return self._next - FIRST_OWN - len(self._free)

    def take(self) -> Pfn:
        if self._free:
            return self._free.pop()
        self._next += 1
        return Pfn(self._next - 1)

    def give_back(self, pfn: Pfn) -> None:
        self._free.append(pfn)


class Vmsa(NamedTuple):
    """Where a vCPU's state is. `hva` is of the bytes of a page that the guest made; KVM's own can be read by nobody."""

    pfn: Pfn
    gfn: int = VMSA_GFN
    hva: int | None = None


class SnpVcpus:
    """`vmsas` by number of the vCPU: of those that were there at LAUNCH_FINISH, and of those that the guest made."""

    def __init__(self, rmp: Rmp, firmware: Firmware, own_pages: OwnPages, asid: int) -> None:
        self.vmsas: dict[int, Vmsa] = {}
        self.inside: set[int] = set()
        self._own: list[Pfn] = []
        self._rmp = rmp
        self._firmware = firmware
        self._own_pages = own_pages
        self._asid = asid

    def launch(self, context: Context, states: Mapping[int, bytes], features: int) -> None:
        """SNP_LAUNCH_UPDATE of a VMSA page for each state. Raises: FirmwareError, no page is the guest's."""
        try:
            for vcpu, state in states.items():
                self._add(context, vcpu, vmsa_page(state, features))
        except FirmwareError:
            self.take_back()
            raise

    def _add(self, context: Context, vcpu: int, contents: bytes) -> None:
        pfn = self._own_pages.take()
        status = self._rmp.rmpupdate(pfn, State(True, self._asid, VMSA_GFN, immutable=True))
        if status is not Status.SUCCESS:
            self._own_pages.give_back(pfn)
            raise FirmwareError("RMPUPDATE", status.name, vcpu=vcpu)
        self._own.append(pfn)
        answer, _ = self._firmware.launch_update(context, VMSA_GFN, pfn, PageType.VMSA, contents)
        if answer is not SevStatus.SUCCESS:
            raise FirmwareError("SNP_LAUNCH_UPDATE", answer.name, vcpu=vcpu)
        self.vmsas[vcpu] = Vmsa(pfn)

    def enter(self, vcpu: int) -> None:
        """VMRUN. Raises: FirmwareError VMEXIT_INVALID."""
        vmsa = self.vmsas.get(vcpu)
        fault = Fault.INVALID if vmsa is None else self._rmp.vmrun(self._asid, vmsa.gfn, vmsa.pfn)
        if fault is not None:
            raise FirmwareError("VMRUN", fault.value, vcpu=vcpu)
        self.inside.add(vcpu)

    def leave(self, vcpu: int) -> None:
        """#VMEXIT."""
        if vcpu in self.inside:
            self._rmp.vmexit(self.vmsas[vcpu].pfn)
            self.inside.remove(vcpu)

    # Pages that the guest made

    def gfn(self, vcpu: int) -> int | None:
        vmsa = self.vmsas.get(vcpu)
        return None if vmsa is None or vmsa.hva is None else vmsa.gfn

    def page(self, vcpu: int) -> Pfn | None:
        vmsa = self.vmsas.get(vcpu)
        return None if vmsa is None or vmsa.hva is None else vmsa.pfn

    def use(self, vcpu: int, gfn: int, block: Block) -> None:
        assert vcpu not in self.inside
        self.vmsas[vcpu] = Vmsa(block.pfn, gfn, block.hva)

    def drop(self, vcpu: int) -> None:
        assert vcpu not in self.inside
        self.vmsas.pop(vcpu, None)

    def load(self, vcpu: int) -> tuple[Regs, Sregs]:
        return load(read_host(self._hva(vcpu), PAGE_SIZE))

    def save(self, vcpu: int, regs: Regs, sregs: Sregs) -> None:
        hva = self._hva(vcpu)
        write_host(hva, save(read_host(hva, PAGE_SIZE), regs, sregs))

    def is_good(self, vcpu: int) -> bool:
        vmsa = self.vmsas.get(vcpu)
        return vmsa is not None and self._rmp.is_vmsa(self._asid, vmsa.gfn, vmsa.pfn)

    def _hva(self, vcpu: int) -> int:
        hva = self.vmsas[vcpu].hva
        assert hva is not None, "KVM's own page"
        return hva

    # The end

    def take_back(self) -> None:
        """KVM's own pages are the host's again; one that cannot be is lost (snp_leak_pages)."""
        assert not self.inside, "S8: a vCPU is inside a guest that ends"
        for pfn in self._own:
            self._rmp.reclaim(pfn)
            if self._rmp.rmpupdate(pfn, State()) is Status.SUCCESS:
                self._own_pages.give_back(pfn)
        self._own.clear()
        self.vmsas.clear()
