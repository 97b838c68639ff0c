"""A page is converted through the file of a helper, which then ends."""

from guestmem.check.link_actors import second_view
from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Store
from guestmem.host import Gmem
from guestmem.memory import Access, File


@scenario(sometimes={"owner: ok", "convert: ok", "close: ok"})
def convert_through_a_link(m: Machine) -> None:
    """Whoever converts, every view is told, and a view that goes meanwhile is not (S1, S2, S3, S20)."""
    gmem = m.gmem()
    helper = second_view(m, gmem)
    context = helper.kvm.memslots.by_gfn[0].context
    assert context is not None
    linked = next(fd for fd in m.process.fds.open_fds() if m.process.fds.get(fd) is context.file)
    file = m.process.fds.get(linked)
    assert isinstance(file, File)
    m.actor("owner", m.guest(Store(0, 1)))
    m.actor("convert", m.convert(Gmem(m, file, linked), Access.PRIVATE))
    m.actor("close", m.close_fd(linked))
