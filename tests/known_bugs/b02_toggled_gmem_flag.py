"""B02, CVE-2025-68810: an update of flags may take the guest_memfd flag off a slot."""

from guestmem.check.mutants import mutant
from guestmem.kvm.memslots import MemorySlot
from guestmem.kvm.set_region import Region, _new_slot
from guestmem.kvm.vm import Kvm


@mutant("B02", replaces="guestmem.kvm.set_region:_change", breaks={"S5", "S6", "S16"})
async def toggled_gmem_flag(kvm: Kvm, old: MemorySlot, region: Region) -> None:
    """The old and new flags are not compared; the old slot is freed without an unbind."""
    new = _new_slot(region)
    if region.flags != old.flags:
        await kvm.swap_memslots(kvm.memslots.replace(old, new))
        old.freed = True
