"""B16, f13e90059908: the source of a CPUID page is pinned for reading, and written to when firmware corrects it."""

from guestmem.arch.snp.guest import SnpGuest
from guestmem.check.mutants import mutant


@mutant("B16", replaces="guestmem.arch.snp.guest:SnpGuest.corrects", breaks={"S11"})
def pinned_for_reading(self: SnpGuest, kind: int) -> bool:
    """pin(write=False), then write."""
    return False
