"""KVM_PRE_FAULT_MEMORY: filling stage 2 before the guest runs. KVM's initiative; the provider only answers (R9)."""

from __future__ import annotations

import errno

from guestmem.kvm.addresses import Gpa, gfn_of
from guestmem.kvm.mmu import FaultResult, page_fault
from guestmem.kvm.vm import Kvm
from guestmem.memory import PAGE_SIZE
from guestmem.trace import Refusal
from guestmem.uapi.structs import PreFaultMemory

_U64 = 1 << 64


async def pre_fault_memory(kvm: Kvm, alleged: PreFaultMemory) -> PreFaultMemory:
    """Map the frames of a range, as read accesses would; what is left to do. Succeeds if one page was mapped.

    Raises: Refusal EINVAL `prefault.flags`, `prefault.unaligned`, `prefault.range`; EINTR `prefault.interrupted`;
    ENOENT `prefault.no_slot`; what page_fault refuses. Source: kvm_vcpu_pre_fault_memory, spec/uapi.md section 12.
    """
    gpa, size = alleged.gpa, alleged.size
    if alleged.flags:
        raise Refusal(errno.EINVAL, "prefault.flags", flags=alleged.flags)
    if (gpa | size) & (PAGE_SIZE - 1):
        raise Refusal(errno.EINVAL, "prefault.unaligned", gpa=gpa, size=size)
    if not gpa < gpa + size < _U64:
        raise Refusal(errno.EINVAL, "prefault.range", gpa=gpa, size=size)
    end = gpa + size
    try:
        while gpa < end:
            if kvm.scheduler.signal_pending:
                raise Refusal(errno.EINTR, "prefault.interrupted", gpa=gpa)
            await _pre_fault_page(kvm, Gpa(gpa))
            gpa += PAGE_SIZE
    except Refusal:
        if gpa == alleged.gpa:
            raise
    return PreFaultMemory(gpa, end - gpa)


async def _pre_fault_page(kvm: Kvm, gpa: Gpa) -> None:
    if kvm.stage2.lookup(gfn_of(gpa)) is not None:
        return
    while True:
        result = await page_fault(kvm, gpa, write=False, prefault=True)
        if result is FaultResult.MAPPED:
            return
        if result is FaultResult.MMIO:
            raise Refusal(errno.ENOENT, "prefault.no_slot", gpa=gpa)
        await kvm.scheduler.cond_resched("pre-fault again")
