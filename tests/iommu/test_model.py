"""Devices against a model: a dict of pages and a dict of what each IOVA shows predict every DMA and every conversion.

Two devices on one address space, of T=0 and T=1, and any sequence of mapping, unmapping, conversion, holes, pins and
DMA; every property after every step.
"""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from guestmem import Access, DmaFault, Refusal
from guestmem.iommu.script import DeviceHandle
from guestmem.memory import PAGE_SIZE
from tests.iommu.conftest import BASE, Io

K = PAGE_SIZE
PAGES = 8
pages = st.integers(0, PAGES - 1)
counts = st.integers(1, 3)
accesses = st.sampled_from([Access.SHARED, Access.PRIVATE])


class Devices(RuleBasedStateMachine):
    """`shown` is the mapping of each page of IOVA; `reached` has (trusted, page) of those without page requests."""

    def __init__(self) -> None:
        super().__init__()
        self.io = Io()
        self.devices: dict[Access, DeviceHandle] = {
            Access.SHARED: self.io.device,
            Access.PRIVATE: self.io.plug(trusted=True),
        }
        self.access = [Access.SHARED] * PAGES
        self.bytes = [0] * PAGES
        self.shown: dict[int, int] = {}  # page of IOVA -> page of the file
        self.pinned: dict[int, list[int]] = {}  # page of IOVA -> page that was pinned; after a hole, and its byte
        self.turn = 0

    def teardown(self) -> None:
        self.io.host.check()
        self.io.bench.close()

    def answer(self, call, *arguments, **named) -> str:  # type: ignore[no-untyped-def]
        try:
            call(*arguments, **named)
        except Refusal as refusal:
            return refusal.rule
        return "ok"

    @rule(at=pages, page=pages, count=counts, follow=st.booleans())
    def map(self, at: int, page: int, count: int, follow: bool) -> None:
        gmem = self.io.gmem.file
        answer = self.answer(self.io.space.map_gmem, gmem, page * K, count * K, iova=BASE + at * K, follow=follow)
        taken = any(at + n in self.shown or at + n in self.pinned for n in range(count))
        if page + count > PAGES:
            assert answer == "iommu.past_end"
        elif taken:
            assert answer == "iommu.exists"
        else:
            assert answer == "ok"
            self.shown |= {at + n: page + n for n in range(count)}

    @rule(at=pages, page=pages)
    def pin(self, at: int, page: int) -> None:
        answer = self.answer(self.io.space.map_pinned, self.io.view.hva + page * K, K, iova=BASE + at * K)
        if at in self.shown or at in self.pinned:
            assert answer == "iommu.exists"
        elif self.access[page] is Access.PRIVATE:
            assert answer == "user.page"
        else:
            assert answer == "ok"
            self.pinned[at] = self.held(page) or [page]

    def held(self, page: int) -> list[int] | None:
        """What all pins of the page share that the file has now; a hole makes it a page of their own (see `punch`)."""
        return next((held for held in self.pinned.values() if held == [page]), None)

    @rule(at=pages, count=counts)
    def unmap(self, at: int, count: int) -> None:
        gone = {n for n in range(at, at + count) if n in self.shown or n in self.pinned}
        answer = self.answer(self.io.space.unmap, BASE + at * K, count * K)
        assert answer == ("ok" if gone else "iommu.not_mapped")
        for n in gone:
            self.shown.pop(n, None)
            self.pinned.pop(n, None)

    @rule(page=pages, count=counts, to=accesses)
    def convert(self, page: int, count: int, to: Access) -> None:
        if page + count > PAGES:
            return
        answer = self.answer(self.io.gmem.convert, page * K, count * K, to)
        inside = range(page, page + count)
        if all(self.access[n] is to for n in inside):
            assert answer == "ok"
        elif to is Access.PRIVATE and any(self.held(n) for n in inside):
            assert answer == "convert.busy"
        else:
            assert answer == "ok"
            for n in inside:
                self.access[n] = to

    @rule(page=pages)
    def punch(self, page: int) -> None:
        self.io.gmem.punch_hole(page * K, K)
        if held := self.held(page):
            held.append(self.bytes[page])
        self.bytes[page] = 0

    @rule(at=pages, kind=accesses, write=st.booleans())
    def dma(self, at: int, kind: Access, write: bool) -> None:
        self.turn = self.turn % 255 + 1
        device, iova = self.devices[kind], BASE + at * K
        try:
            if write:
                device.write(iova, bytes((self.turn,)))
                read = self.turn
            else:
                (read,) = device.read(iova, 1)
        except DmaFault as fault:
            assert fault.refusal.rule == self.refusal(at, kind)
            return
        assert self.refusal(at, kind) == ""
        held = self.pinned.get(at)
        if held is not None and len(held) == 2:
            if write:
                held[1] = read
            assert read == held[1]
            return
        page = held[0] if held is not None else self.shown[at]
        if write:
            self.bytes[page] = read
        assert read == self.bytes[page]

    def refusal(self, at: int, kind: Access) -> str:
        """Why a DMA faults, "" if it does not. Pinned memory is shared memory."""
        if at in self.pinned:
            return "" if kind is Access.SHARED else "dma.unmapped"
        if at not in self.shown:
            return "dma.unmapped"
        return "" if self.access[self.shown[at]] is kind else "fault.access"

    @rule(page=pages)
    def host_reads(self, page: int) -> None:
        if self.access[page] is Access.SHARED:
            assert self.io.view[page * K] == self.bytes[page]

    @invariant()
    def nothing_is_mapped_that_may_not_be(self) -> None:
        """Two books: the page tables against the model."""
        for domain in self.io.space.ioas.domains:
            for number, _, _ in domain.table.leaves():
                assert not self.refusal(number - (BASE >> 12), domain.access)


TestDevices = Devices.TestCase
TestDevices.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
