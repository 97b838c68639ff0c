"""B19: which mappings go is decided by how the file was created and not by the state of its pages."""

from guestmem.check.mutants import mutant
from guestmem.kvm.context import KvmGmemContext
from guestmem.memory import Invalidation


@mutant("B19", replaces="guestmem.kvm.context:KvmGmemContext.invalidate_begin", breaks={"S1", "S2", "S3", "S10"})
async def filter_by_birth(self: KvmGmemContext, invalidation: Invalidation) -> None:
    """filter = initial kind."""
    ranges = self.gfns_of(invalidation.pages)
    if ranges:
        await self.kvm.stage2.begin(ranges, (self.inode.attributes.birth,))
