"""A file is frozen while a guest touches a new page, a page is converted and one is punched out."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Load
from guestmem.memory import Access


@scenario(
    sometimes={
        "freeze: same",
        "guest: ok 0x00",
        "guest: frozen.fault",
        "convert: ok",
        "convert: frozen.convert",
        "punch: ok",
        "punch: frozen.fallocate",
    },
    never={"freeze: changed"},
)
def freeze_against_everything(m: Machine) -> None:
    """What was there when it was frozen is there afterwards, and nothing else."""
    gmem = m.gmem(3)
    gmem.mmap()[0] = 1
    inode = gmem.inode

    def pages() -> tuple[list[int], list[tuple[int, int, Access]]]:
        return list(inode.folios.present), gmem.accesses()

    async def freeze() -> str:
        await inode.freeze()
        before = pages()
        await m.scheduler.preempt("frozen")
        return "same" if pages() == before else "changed"

    m.actor("freeze", freeze())
    m.actor("guest", m.guest(Load(0x1000)))
    m.actor("convert", m.convert(gmem, Access.PRIVATE, page=2))
    m.actor("punch", m.punch(gmem))
