"""The memory of a page goes bad while a device uses it."""

from guestmem.check.dma import Dma
from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario


@scenario(sometimes={"device: ok", "device: fault.poisoned", "poison: ok"})
def poison_against_dma(m: Machine) -> None:
    """It goes from every page table, and no page request brings it back."""
    gmem = m.gmem()
    gmem.mmap()[0] = 7
    dma = Dma(m)
    dma.map(gmem)
    m.actor("device", dma.write(b"d"), dma.write(b"e"))
    m.actor("poison", m.poison(gmem))
