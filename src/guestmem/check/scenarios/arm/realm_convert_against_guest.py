"""A page of a realm is converted while the guest uses it, and the monitor may be unable to change the GPT."""

from guestmem.check.machine import Machine
from guestmem.check.protected import launched
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Store
from guestmem.memory import Access
from guestmem.uapi.kvm import VmType


@scenario(
    failures=1,
    sometimes={"guest: ok", "guest: arch.make_private", "convert: ok", "convert: convert.bad_page", "host: ok"},
)
def realm_convert_against_guest(m: Machine) -> None:
    """A granule is the realm's exactly while it is private; one that cannot be undelegated is bad (S2, S9, S19)."""
    launched(m, VmType.ARM_REALM)
    gmem = m.gmem(init_shared=False)
    m.actor("guest", m.guest(Store(0, 1)))
    m.actor("convert", m.convert(gmem, Access.SHARED))
    m.actor("host", m.write(gmem.mmap(), b"h"))
