"""A memslot of an SNP guest goes while the guest uses it, and every firmware call may fail."""

from guestmem.check.machine import Machine
from guestmem.check.protected import launched_gmem
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Store


@scenario(failures=1, sometimes={"guest: ok", "vmm: ok", "again: ok", "again: fault.poisoned"})
def snp_slot_delete_against_guest(m: Machine) -> None:
    """An entry of the RMP lives as long as the binding, and names its address, also when that is another (S9)."""
    gmem = launched_gmem(m)
    m.actor("guest", m.guest(Store(0, 1)))
    m.actor("vmm", m.delete_slot(), m.bind(gmem, 1, 1 << 20))
    m.actor("again", m.guest(Store(1 << 20, 2)))
