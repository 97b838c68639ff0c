"""A file is frozen while a guest touches a new page, and while another page is punched out."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Load


@scenario(
    sometimes={
        "freeze: same",
        "guest: ok 0x00",
        "guest: frozen.fault",
        "punch: ok",
        "punch: frozen.fallocate",
    },
    never={"freeze: changed"},
)
def freeze_against_guest(m: Machine) -> None:
    """What was there when it was frozen is there afterwards, and nothing else."""
    gmem = m.gmem(2)
    gmem.mmap()[0] = 1
    inode = gmem.inode

    async def freeze() -> str:
        await inode.freeze()
        before = list(inode.folios.present)
        await m.scheduler.preempt("frozen")
        return "same" if list(inode.folios.present) == before else "changed"

    m.actor("freeze", freeze())
    m.actor("guest", m.guest(Load(0x1000)))
    m.actor("punch", m.punch(gmem))
