"""A file is linked while its last descriptor, and that of its VM, are closed."""

from guestmem.check.link_actors import link
from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.uapi.kvm import VmType


@scenario(sometimes={"link: ok", "link: link.not_open", "link: link.nomem", "close: ok"}, failures=1)
def link_against_last_close(m: Machine) -> None:
    """The link holds the file while it is made, and finds it gone afterwards; the memory outlives its first VM (S6)."""
    gmem = m.gmem(gpa=None)
    destination = m.create_vm(VmType.SW_PROTECTED)
    m.actor("link", link(m, gmem, destination))
    m.actor("close", m.close_fd(gmem.fd), m.close_fd(m.vm().fd))
