"""B27: a fault for a write finds a read-only leaf and leaves it, so the guest faults for ever."""

from guestmem.check.mutants import mutant
from guestmem.kvm.addresses import Gfn
from guestmem.kvm.stage2 import Leaf, Stage2
from guestmem.memory import Access, Range


@mutant("B27", replaces="guestmem.kvm.stage2:Stage2.install", breaks={"L2", "L5"})
def map_if_absent(self: Stage2, leaf: Leaf, access: Access, seen: int) -> bool:
    """A frame that has a leaf keeps it."""
    if self.window.blocks(seen, Range(leaf.gfn, Gfn(leaf.gfn + (1 << leaf.order)))):
        return False
    if self.lookup(leaf.gfn, access) is None:
        self.tables[access].map(leaf.gfn, leaf.order, leaf)
    return True
