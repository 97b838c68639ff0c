"""fallocate while a signal may come and memory may run out."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario


@scenario(sometimes={"vmm: ok", "vmm: fallocate.interrupted", "vmm: pool.empty", "host: ok"}, failures=1)
def allocate_interrupted(m: Machine) -> None:
    """What was allocated before stays; nothing is lost and nothing is counted twice (S14)."""
    gmem = m.gmem(pages=2)
    view = gmem.mmap()
    m.actor("vmm", m.allocate(gmem, pages=2), m.allocate(gmem, pages=2))
    m.actor("host", m.write(view, b"h", page=1))
