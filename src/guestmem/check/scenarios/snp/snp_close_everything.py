"""Memory of an SNP guest is punched and its file closed, while the guest uses it and firmware may fail."""

from guestmem.check.machine import Machine
from guestmem.check.protected import launched_gmem
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Store


@scenario(failures=1, sometimes={"guest: ok", "guest: fault.file_gone", "punch: ok", "close: ok"})
def snp_close_everything(m: Machine) -> None:
    """A page that reaches the allocator is the host's in the RMP, or never reaches it (S8, S10, S19)."""
    gmem = launched_gmem(m)
    m.actor("guest", m.guest(Store(0, 1)))
    m.actor("punch", m.punch(gmem))
    m.actor("close", m.close_fd(gmem.fd))
