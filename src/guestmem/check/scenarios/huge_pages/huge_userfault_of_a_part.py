"""A huge page of which a part has yet to be brought, by KVM Userfault."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Load
from guestmem.memory import PAGE_SIZE


@scenario(sometimes={"guest: fault.userfault 0x00", "pre-fault: ok"}, never={"guest: ok 0x00 0x00"})
def huge_userfault_of_a_part(m: Machine) -> None:
    """No leaf covers more than what was asked for, whoever has it mapped."""
    gmem, missing = m.gmem(pages=4, init_shared=False, gpa=None, order=2), m.anonymous(8)
    missing.write(0, b"\2")
    m.run(m.bind(gmem, 0, 0, pages=4, missing=missing))
    m.actor("guest", m.guest(Load(0), Load(PAGE_SIZE)))
    m.actor("pre-fault", m.pre_fault(0))
