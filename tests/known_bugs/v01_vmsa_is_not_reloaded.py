"""CVE-2026-90040, spec/semantics.md 13: the page of a VMSA leaves the file, and the vCPU keeps its number."""

from guestmem.check.mutants import mutant
from guestmem.kvm.addresses import Gfn
from guestmem.kvm.vm import Kvm
from guestmem.memory import Range


@mutant("V01", replaces="guestmem.kvm.protected.state_page:reload", breaks={"S3", "S19"})
async def vmsa_is_not_reloaded(kvm: Kvm, ranges: list[Range[Gfn]]) -> None:
    """An invalidation asks nobody to look the page up again."""
