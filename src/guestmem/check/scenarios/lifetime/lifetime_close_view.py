"""A file is closed of which a helper has another, in which nothing is bound."""

from guestmem.check.machine import Machine
from guestmem.check.protected import used_gmem
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Load


@scenario(sometimes={"guest: ok 0x07", "guest: fault.file_gone"})
def lifetime_close_view(m: Machine) -> None:
    """File closed, a helper has an unbound view."""
    gmem = used_gmem(m)
    helper = m.create_vm(m.protected)
    helper.copy_enc_context_from(m.vm())
    helper.link_guest_memfd(gmem)
    m.actor("vmm", m.close_fd(gmem.fd))
    m.actor("guest", m.guest(Load(0)))
