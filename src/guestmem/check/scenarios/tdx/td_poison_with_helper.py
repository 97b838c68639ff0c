"""Memory of a TD goes bad while its guest and a helper's use it."""

from guestmem.check.invariants import Violation
from guestmem.check.link_actors import second_view
from guestmem.check.machine import Machine
from guestmem.check.protected import launched_gmem
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Load, Store
from guestmem.memory import PageIndex
from guestmem.uapi.kvm import VmType


@scenario(sometimes={"guest: ok 0x07", "guest: fault.poisoned", "helper: ok 0x07", "memory: ok"})
def td_poison_with_helper(m: Machine) -> None:
    """When all views have been told the page is out of the TD's one table (S3, S19)."""
    gmem = launched_gmem(m, vm_type=VmType.TDX)
    helper = second_view(m, gmem)
    m.beforehand(m.guest(Store(0, 7)))

    async def fail() -> None:
        await m.poison(gmem)
        pfn = gmem.inode.folios.pfn(PageIndex(0))
        if pfn is not None and m.platforms[VmType.TDX].owner(pfn) is not None:
            raise Violation("S19", "bad memory is still the TD's")

    m.actor("memory", fail())
    m.actor("guest", m.guest(Load(0)))
    m.actor("helper", m.guest(Load(0), vm=helper))
