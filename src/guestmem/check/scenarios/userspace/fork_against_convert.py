"""The VMM forks while a conversion is under way."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.memory import Access


@scenario(sometimes={"fork: SIGBUS", "fork: ok", "convert: ok"})
def fork_against_convert(m: Machine) -> None:
    """Whichever comes first, the child never sees a private page."""
    gmem = m.gmem()
    view = gmem.mmap()
    view[0] = 1

    async def fork() -> None:
        child = await m.process.fork()
        await child.mm.read(view.hva, 1)

    m.actor("fork", fork())
    m.actor("convert", m.convert(gmem, Access.PRIVATE))
