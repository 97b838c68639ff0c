"""B08: the number of a flag's bit is used as the flag.

Upstream it was AS_INACCESSIBLE, so that the host touched private pages. Here it is INIT_SHARED, bit 1, taken for the
mask 1, which is MMAP: every mappable file is born shared.
"""

from guestmem.check.mutants import mutant
from guestmem.memory import Abilities


@mutant("B08", replaces="guestmem.kvm.gmem:Abilities", breaks={"S16", "never"})
def flag_index_as_mask(mmap: bool, init_shared: bool, convertible: bool) -> Abilities:
    """flags & 1 where flags & (1 << 1) is meant."""
    return Abilities(mmap=mmap, init_shared=mmap, convertible=convertible)
