"""As B32, for a VMSA: its page leaves the file between the look-up and the use."""

from guestmem.arch import Block
from guestmem.check.mutants import mutant
from guestmem.kvm.addresses import Gfn
from guestmem.kvm.protected.guest_mode import GuestMode
from guestmem.kvm.stage2 import Leaf


@mutant("V02", replaces="guestmem.kvm.protected.state_page:_use", breaks={"S3", "S10"})
def stale_vmsa_used(mode: GuestMode, leaf: Leaf, gfn: Gfn, seen: int) -> bool:
    """The sequence number is not compared."""
    block = Block(leaf.pfn, 0, leaf.hva)
    mode.architecture.make_private(gfn, block)
    pages = mode.architecture.state_pages
    assert pages is not None
    pages.use(mode.number, gfn, block)
    mode.state_loaded = False
    return True
