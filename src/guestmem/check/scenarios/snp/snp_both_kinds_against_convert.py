"""An SNP guest has a page mapped without the C-bit and with it, while its VMM makes the page private."""

from guestmem.check.machine import Machine
from guestmem.check.protected import launched_gmem
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Load, Store
from guestmem.memory import Access


@scenario(
    sometimes={
        "guest: ok 0x07",
        "guest: fault.mismatch",
        "guest: fault.mismatch 0x07",
        "convert: ok",
        "host: ok",
        "host: SIGBUS",
    }
)
def snp_both_kinds_against_convert(m: Machine) -> None:
    """An access is of the kind that the guest asserts, or a memory fault; the host sees what is shared (S1, S2, L5)."""
    gmem = launched_gmem(m, init_shared=True)
    m.actor("guest", m.guest(Store(0, 7, private=False), Load(0, private=False), Store(0, 9, private=True)))
    m.actor("convert", m.convert(gmem, Access.PRIVATE))
    m.actor("host", m.write(gmem.mmap(), b"h"))
