"""What becomes of a machine whose device writes on while a TD's page becomes private: nobody looks into tables here."""

from guestmem.check.dma import Dma
from guestmem.check.machine import Machine
from guestmem.check.protected import launched_gmem
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Load
from guestmem.memory import Access
from guestmem.uapi.kvm import VmType


@scenario(sometimes={"device: ok", "device: fault.access", "convert: ok", "guest: ok 0x00"})
def td_stray_dma(m: Machine) -> None:
    """A device that was not told in time resets the machine (MC)."""
    gmem = launched_gmem(m, vm_type=VmType.TDX, init_shared=True)
    dma = Dma(m)
    dma.map(gmem)
    m.effects_only = True
    m.actor("device", dma.write(b"d"))
    m.actor("convert", m.convert(gmem, Access.PRIVATE))
    m.actor("guest", m.guest(Load(0)))
