"""A page of an SNP guest is converted while the guest uses it, and every firmware call may fail."""

from guestmem.check.machine import Machine
from guestmem.check.protected import launched_gmem
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Store
from guestmem.memory import Access


@scenario(
    failures=1,
    sometimes={
        "guest: ok",
        "guest: arch.make_private",
        "guest: fault.poisoned",
        "convert: ok",
        "convert: convert.bad_page",
        "host: ok",
        "host: SIGBUS",
    },
)
def snp_convert_against_guest(m: Machine) -> None:
    """The RMP has the page exactly while it is private; one that it would not give back is bad (S2, S9, S19)."""
    gmem = launched_gmem(m)
    m.actor("guest", m.guest(Store(0, 1)))
    m.actor("convert", m.convert(gmem, Access.SHARED))
    m.actor("host", m.write(gmem.mmap(), b"h"))
