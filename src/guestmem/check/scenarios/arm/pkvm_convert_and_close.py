"""A page of a pKVM guest is lent, taken back and punched, and its file closed, while the guest uses it."""

from guestmem.check.machine import Machine
from guestmem.check.protected import launched
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Load, Store
from guestmem.memory import Access
from guestmem.uapi.kvm import VmType


@scenario(failures=1, sometimes={"guest: ok 0x01", "vmm: ok", "close: ok", "guest: fault.file_gone"})
def pkvm_convert_and_close(m: Machine) -> None:
    """What the guest lends is the host's too, what leaves the file is the host's alone (S2, S9, S10)."""
    launched(m, VmType.ARM_PROTECTED)
    gmem = m.gmem(init_shared=False)
    m.actor("guest", m.guest(Store(0, 1), Load(0)))
    m.actor("vmm", m.convert(gmem, Access.SHARED), m.punch(gmem))
    m.actor("close", m.close_fd(gmem.fd))
