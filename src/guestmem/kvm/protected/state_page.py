"""The page of the guest's that a vCPU's state is in (an SNP guest's VMSA), as KVM looks it up, and lets go of it.

    AP creation -> request -> the vCPU: page looked up under the sequence number -> VMRUN with it
    its page leaves -> request, and wait until the vCPU is out -> the vCPU: looked up again, which finds no VMSA there

The number of the page is a cache like a leaf: it may not outlive the look-up that it came from (S3). Nobody but the
vCPU itself touches what it enters with, so who takes the page away asks it to, and waits.

Source: arch/x86/kvm/svm/sev.c sev_snp_init_protected_guest_state, sev_gmem_invalidate_range (v7.3, CVE-2026-90040).
From memory: what the latter does with the address, which is looked up again here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from guestmem.arch import Block, FirmwareError
from guestmem.kvm.addresses import Gfn, gfn_of
from guestmem.kvm.mmu import find_gmem_page
from guestmem.kvm.stage2 import Leaf
from guestmem.memory import PAGE_SHIFT, Access, File, Pfn, Range
from guestmem.trace import Refusal
from guestmem.uapi.kvm import KVM_MP_STATE_HALTED, KVM_MP_STATE_RUNNABLE

if TYPE_CHECKING:
    from guestmem.kvm.protected.guest_mode import GuestMode
    from guestmem.kvm.vcpu import Vcpu
    from guestmem.kvm.vm import Kvm


async def update(vcpu: Vcpu, mode: GuestMode) -> None:
    """Handle the request: the vCPU has the page at `state_gpa` afterwards, or none, and is halted."""
    pages = mode.architecture.state_pages
    if not mode.waiting_for_reset or pages is None:
        return
    mode.waiting_for_reset = False
    vcpu.mp_state = KVM_MP_STATE_HALTED
    pages.drop(mode.number)
    if mode.state_gpa is not None and await _look_up(vcpu, mode, gfn_of(mode.state_gpa)):
        vcpu.mp_state = KVM_MP_STATE_RUNNABLE


async def _look_up(vcpu: Vcpu, mode: GuestMode, gfn: Gfn) -> bool:
    """Whether there is a private page. One that left while it was looked up is looked up once more."""
    kvm = vcpu.kvm
    held: list[File] = []
    try:
        with kvm.srcu.read():
            slot = kvm.memslots.find(gfn)
            if slot is None or slot.invalid or not slot.has_gmem:
                return False
            seen = kvm.stage2.window.sequence.read()
            try:
                leaf, _ = await find_gmem_page(kvm, slot, gfn, Access.PRIVATE, held)
            except Refusal:
                return False
            await kvm.scheduler.preempt("state page looked up, not used")
            async with kvm.stage2.mmu_lock:
                return _use(mode, leaf, gfn, seen)
    finally:
        for file in held:
            await file.put()


def _use(mode: GuestMode, leaf: Leaf, gfn: Gfn, seen: int) -> bool:
    stage2, pages = mode.vcpu.kvm.stage2, mode.architecture.state_pages
    inside = gfn - leaf.gfn
    block = Block(Pfn(leaf.pfn + inside), 0, leaf.hva + (inside << PAGE_SHIFT))
    if stage2.window.blocks(seen, Range(gfn, Gfn(gfn + 1))):
        mode.requested = mode.waiting_for_reset = True
        return False
    try:
        mode.architecture.make_private(gfn, block)
    except FirmwareError:
        return False
    assert pages is not None
    pages.use(mode.number, gfn, block)
    mode.state_loaded = False
    return True


async def reload(kvm: Kvm, ranges: list[Range[Gfn]]) -> None:
    """Pages over these frames are about to go: no vCPU is in the guest with one of them, or on its way, when this
    returns. A window is open over them."""
    pages = kvm.machine.architecture.state_pages
    if pages is None:
        return
    found = []
    for vcpu in kvm.vcpus.values():
        mode = vcpu.guest_mode
        gfn = pages.gfn(mode.number) if mode is not None else None
        if mode is not None and gfn is not None and any(gfns.contains(Gfn(gfn)) for gfns in ranges):
            if not mode.waiting_for_reset:
                mode.state_gpa = gfn << PAGE_SHIFT
                mode.waiting_for_reset = True
            found.append(mode)
            mode.requested = True
    for mode in found:
        await mode.request()
