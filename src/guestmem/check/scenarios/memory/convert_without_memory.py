"""Conversions while allocations fail."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.memory import Access


@scenario(sometimes={"convert: convert.nomem", "convert: ok", "host: pool.empty"}, failures=1)
def convert_without_memory(m: Machine) -> None:
    """A conversion that finds no memory for its books has changed nothing (S15)."""
    gmem = m.gmem(pages=2)
    m.actor("host", m.write(gmem.mmap(), b"h"))
    m.actor("convert", m.convert(gmem, Access.PRIVATE, page=1), m.convert(gmem, Access.PRIVATE, pages=2))
