"""B45, 309d28576f0a: a guest ends another vCPU, whose VMRUN is on its way, and takes the VMSA page back."""

from guestmem.check.mutants import mutant
from guestmem.kvm.protected.guest_mode import GuestMode


@mutant("B45", replaces="guestmem.kvm.protected.guest_mode:GuestMode.request", breaks={"S3"})
async def kick_is_not_awaited(self: GuestMode) -> None:
    """The kick is sent, and its acknowledgement not waited for."""
    self.requested = True
    self.kick()
