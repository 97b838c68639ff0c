"""A VMM that repeats its conversion while direct I/O pins the page for moments."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.memory import Access
from guestmem.trace import Refusal


@scenario(sometimes={"vmm: done at once", "vmm: done later", "io: ok"})
def convert_until_done(m: Machine) -> None:
    """With transient references only, a conversion that is repeated succeeds in the end (L1)."""
    gmem = m.gmem()
    view = gmem.mmap()
    view[0] = 1

    async def vmm() -> str:
        answer = "done at once"
        while True:
            try:
                await m.convert(gmem, Access.PRIVATE)
                return answer
            except Refusal:
                answer = "done later"
                await m.scheduler.cond_resched("busy, try again")

    m.actor("io", m.pin_briefly(view))
    m.actor("vmm", vmm())
