"""B26: pre-fault retries inside its read section while the deletion of the slot waits for that section."""

import errno

from guestmem.check.mutants import mutant
from guestmem.kvm.addresses import Gpa
from guestmem.kvm.mmu import FaultResult, page_fault
from guestmem.kvm.vm import Kvm
from guestmem.trace import Refusal


@mutant("B26", replaces="guestmem.kvm.prefault:_pre_fault_page", breaks={"L2", "L4", "L5"})
async def prefault_waits_for_deletion(kvm: Kvm, gpa: Gpa) -> None:
    """An invalid slot is RETRY, and the section is left only when it is mapped."""
    with kvm.srcu.read():
        await kvm.scheduler.preempt("in the read section, slot not looked up")
        while True:
            result = await page_fault(kvm, gpa, write=False)
            if result is FaultResult.MAPPED:
                return
            if result is FaultResult.MMIO:
                raise Refusal(errno.ENOENT, "prefault.no_slot", gpa=gpa)
            await kvm.scheduler.cond_resched("pre-fault again")
