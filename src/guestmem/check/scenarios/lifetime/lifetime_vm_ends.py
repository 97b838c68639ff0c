"""A VM is gone but for a file that somebody forgot, in which its private pages are bound nowhere."""

from guestmem.check.machine import Machine
from guestmem.check.protected import used_gmem
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Load


@scenario(sometimes={"guest: ok 0x07", "guest: ok 0xff"})
def lifetime_vm_ends(m: Machine) -> None:
    """VM closed, a descriptor of its file forgotten."""
    gmem = used_gmem(m)
    m.actor("vmm", m.delete_slot(), *(m.close_fd(fd) for fd in m.process.fds.open_fds() if fd != gmem.fd))
    m.actor("guest", m.guest(Load(0)))
