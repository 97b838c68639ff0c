"""Guest, last descriptor and mapping go at the same time."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Store


@scenario(sometimes={"guest: ok", "guest: fault.file_gone", "close: ok", "unmap: ok"})
def close_everything(m: Machine) -> None:
    """Whatever goes last takes the rest with it: nothing is left (L3)."""
    gmem = m.gmem()
    view = gmem.mmap()
    m.actor("guest", m.guest(Store(0, 1)))
    m.actor("close", m.close_fd(gmem.fd))
    m.actor("unmap", m.unmap(view))
