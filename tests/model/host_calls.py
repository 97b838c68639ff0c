"""What processes do: mappings, accesses, fork, pins."""

from __future__ import annotations

import dataclasses

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from guestmem.userspace import Pin, Process, SigBus
from tests.model.pages import Mapping, Pinned
from tests.model.world import (
    PAGES,
    K,
    World,
    page_numbers,
    values,
)


class HostCalls(World):
    """What processes do: mappings, accesses, fork, pins."""

    @precondition(lambda self: self.fd_open and len(self.mappings) < 4)
    @rule(first=page_numbers, pages=st.integers(1, PAGES + 1))
    def mmap(self, first: int, pages: int) -> None:
        view = self.gmem.mmap(first * K, pages * K)
        self.mappings.append(Mapping(view.hva, first, pages))

    @precondition(lambda self: self.mappings)
    @rule(data=st.data())
    def munmap(self, data: st.DataObject) -> None:
        mapping = self.mappings.pop(data.draw(st.integers(0, len(self.mappings) - 1)))
        self.host.run(self.host.process.mm.unmap(mapping.hva, mapping.pages * K))
        self._maybe_released()

    @precondition(lambda self: self.mappings)
    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        mapping = data.draw(st.sampled_from(self.mappings))
        self.host.run(self.host.process.mm.discard(mapping.hva, mapping.pages * K))

    @precondition(lambda self: self.mappings)
    @rule(data=st.data(), value=values)
    def host_store(self, data: st.DataObject, value: int) -> None:
        mapping, page = self._pick(data, self.mappings)
        self._host_access(self.host.process, mapping, page, value)

    @precondition(lambda self: self.mappings)
    @rule(data=st.data())
    def host_load(self, data: st.DataObject) -> None:
        mapping, page = self._pick(data, self.mappings)
        self._host_access(self.host.process, mapping, page, None)

    @precondition(lambda self: self.child is not None and self.child_mappings)
    @rule(data=st.data(), value=st.none() | values)
    def child_access(self, data: st.DataObject, value: int | None) -> None:
        assert self.child is not None
        mapping, page = self._pick(data, self.child_mappings)
        self._host_access(self.child, mapping, page, value)

    def _host_access(self, process: Process, mapping: Mapping, page: int, value: int | None) -> None:
        hva = mapping.hva + (page - mapping.first) * K
        code = self._expect_host_fault(page)
        try:
            if value is None:
                got = self.host.run(process.mm.read(hva, 1))[0]
            else:
                self.host.run(process.mm.write(hva, bytes([value])))
        except SigBus as bus:
            assert (bus.hva, bus.code) == (hva, code)
            return
        assert code is None, "no SIGBUS where there should be one"
        if value is None:
            assert got == self.pages[page].cell.byte
        else:
            self.pages[page].cell.byte = value
        self._allocated(page)

    @precondition(lambda self: self.child is None and not self.released)
    @rule()
    def fork(self) -> None:
        self.child = self.host.run(self.host.process.fork())
        self.child_mappings = [dataclasses.replace(mapping) for mapping in self.mappings]
        self.child_has_fd = self.fd_open

    @precondition(lambda self: self.child is not None)
    @rule()
    def child_exits(self) -> None:
        assert self.child is not None
        self.host.run(self.child.exit())
        self.child, self.child_mappings, self.child_has_fd = None, [], False
        self._maybe_released()

    @precondition(lambda self: self.mappings and len(self.pins) < 3)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        mapping, page = self._pick(data, self.mappings)
        last = data.draw(st.integers(page, mapping.first + mapping.pages - 1))
        wanted = range(page, last + 1)
        call = self.host.process.pin(mapping.hva + (page - mapping.first) * K, len(wanted))
        faults = [number for number in wanted if self._expect_host_fault(number) is not None]
        pin = self._answer(lambda: self.host.run(call), "user.page" if faults else None)
        for number in wanted if not faults else range(page, faults[0]):
            self._allocated(number)
        if isinstance(pin, Pin):
            pages = [self.pages[number] for number in wanted]
            self.pins.append(Pinned(pin, [held.cell for held in pages], pages))

    @precondition(lambda self: self.pins)
    @rule(data=st.data(), value=values)
    def write_through_pin(self, data: st.DataObject, value: int) -> None:
        pinned = data.draw(st.sampled_from(self.pins))
        place = data.draw(st.integers(0, len(pinned.cells) - 1))
        assert pinned.pin.read(place, 1)[0] == pinned.cells[place].byte
        pinned.pin.write(place, bytes([value]))
        pinned.cells[place].byte = value

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        self.pins.pop(data.draw(st.integers(0, len(self.pins) - 1))).pin.unpin()
