"""A guest accepts a page, explicitly, while the VMM punches it out."""

from guestmem.arch.tdx import TdxPlatform
from guestmem.check.machine import Machine
from guestmem.check.protected import launched
from guestmem.check.scenario import scenario
from guestmem.cpu.engine import Tdcall
from guestmem.cpu.scripted import Load
from guestmem.kvm.protected.tdcall import MEM_PAGE_ACCEPT
from guestmem.uapi.kvm import VmType

ACCEPT = Tdcall(MEM_PAGE_ACCEPT)  # of the page at 0, which RCX is


@scenario(sometimes={"guest: ok 0x00", "guest: arch.guest_access", "punch: ok"})
def td_accept_against_punch(m: Machine) -> None:
    """A page that was accepted is accepted no more once it has gone: a new one is pending (S3, S9)."""
    launched(m, VmType.TDX)
    platform = m.platforms[VmType.TDX]
    assert isinstance(platform, TdxPlatform)
    platform.guests_accept = False
    gmem = m.gmem(init_shared=False)
    m.actor("guest", m.guest(ACCEPT, Load(0)))
    m.actor("punch", m.punch(gmem))
