"""GUP: references to the pages behind host addresses, as drivers and the kernel take them (get_user_pages).

A pin holds its pages whatever happens to the mapping: a conversion to private of such a page is refused as long as it
lasts, and a hole detaches the page and leaves the pin its bytes. Private pages cannot be pinned: the fault that would
have to bring them in is refused.

Source: mm/gup.c. How one reference is taken, and why it is sound, is AddressSpace.pin_page.
"""

from __future__ import annotations

import errno

from guestmem.memory import PAGE_SIZE, FolioReference, read_host, write_host
from guestmem.trace import Refusal, Tracer
from guestmem.trace import events as event
from guestmem.userspace.address_space import AddressSpace


class Pin:
    """Pages held through `mm` at `hva`. Give them back with `unpin`, once. Listed in `pins` while it lasts."""

    def __init__(self, pins: list[Pin], tracer: Tracer, mm: AddressSpace, hva: int) -> None:
        self.mm = mm
        self.hva = hva
        self.references: list[FolioReference] = []
        self._pins = pins
        self._tracer = tracer
        pins.append(self)

    @property
    def pages(self) -> int:
        return len(self.references)

    def read(self, page: int, size: int = PAGE_SIZE) -> bytes:
        """Bytes of the `page`-th pinned page, wherever it is now."""
        return read_host(self.references[page].hva, size)

    def write(self, page: int, data: bytes) -> None:
        assert len(data) <= PAGE_SIZE, "more than the page holds"
        write_host(self.references[page].hva, data)
        self.references[page].set_dirty()

    def unpin(self) -> None:
        self._pins.remove(self)
        references, self.references = self.references, []
        for reference in references:
            reference.put()
        if self._tracer.enabled and references:
            self._tracer.emit(event.UserUnpin(self.mm.number, self.hva, len(references)))


async def pin_pages(pins: list[Pin], tracer: Tracer, mm: AddressSpace, hva: int, pages: int, write: bool) -> Pin:
    """pin_user_pages(): hold `pages` pages from the page-aligned `hva` on. All or none.

    Raises: Refusal EFAULT `user.page` when a page cannot be had (private, past the end, not mapped); EINVAL
    `range.unaligned`.
    """
    if hva % PAGE_SIZE or pages <= 0:
        raise Refusal(errno.EINVAL, "range.unaligned", hva=hva, size=pages * PAGE_SIZE)
    pin = Pin(pins, tracer, mm, hva)
    try:
        for address in range(hva, hva + pages * PAGE_SIZE, PAGE_SIZE):
            pin.references.append(await mm.pin_page(address, write))
    except Refusal:
        pin.unpin()
        raise
    if tracer.enabled:
        tracer.emit(event.UserPin(mm.number, hva, pages))
    return pin
