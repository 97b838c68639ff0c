"""Files come and go while allocations fail."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.kvm.gmem import create_guest_memfd
from guestmem.memory import PAGE_SIZE
from guestmem.uapi.structs import CreateGuestMemfd


@scenario(sometimes={"create: ok", "create: create.nomem", "bind: ok"}, failures=2)
def create_while_memory_fails(m: Machine) -> None:
    """A creation that fails leaves no descriptor, inode or reference (S15, L3)."""
    gmem = m.gmem(gpa=None)
    create = create_guest_memfd(m.vm().kvm, m.process.fds, CreateGuestMemfd(PAGE_SIZE, 0))
    m.actor("create", create)
    m.actor("bind", m.bind(gmem, 1, 0), m.delete_slot(1))
