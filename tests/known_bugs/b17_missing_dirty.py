"""B17, 97cd21d57e9b: the CPUID page that firmware corrected is not marked dirty, and reclaim drops the correction."""

from guestmem.check.mutants import mutant
from guestmem.kvm.vm import PinnedPage


@mutant("B17", replaces="guestmem.kvm.protected.launch:correct", breaks={"S12"})
async def missing_dirty(source: PinnedPage, contents: bytes) -> None:
    """Skip set_dirty."""
    await source.write(0, contents)
