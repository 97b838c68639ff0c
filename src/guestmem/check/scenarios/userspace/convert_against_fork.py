"""A child process touches a page that the parent converts."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.memory import Access


@scenario(sometimes={"child: ok", "child: SIGBUS", "convert: ok"})
def convert_against_fork(m: Machine) -> None:
    """A conversion unmaps the page from every process, the forked one too."""
    gmem = m.gmem()
    view = gmem.mmap()
    view[0] = 1
    child = m.run(m.process.fork())
    m.run(m.read(view, process=child))
    m.actor("child", m.write(view, b"c", process=child))
    m.actor("convert", m.convert(gmem, Access.PRIVATE))
