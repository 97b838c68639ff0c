"""What the VM does: memslots, guest accesses, pre-fault, populate."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from guestmem.check.invariants import snapshot
from guestmem.cpu.scripted import Load, ScriptedEngine, Store
from guestmem.kvm.exits import HltExit, MemoryFaultExit
from guestmem.trace import Refusal
from tests.model.pages import Page
from tests.model.world import (
    GUEST_PAGES,
    PAGES,
    PRIVATE,
    SHARED,
    SLOTS,
    K,
    World,
    assertions,
    ranges,
    values,
)


class GuestCalls(World):
    """What the VM does: memslots, guest accesses, pre-fault, populate."""

    @precondition(lambda self: self.fd_open)
    @rule(slot=st.integers(0, SLOTS - 1), frame=st.integers(0, GUEST_PAGES - 1), pages=ranges)
    def bind(self, slot: int, frame: int, pages: tuple[int, int]) -> None:
        first, count = pages[0], pages[1] - pages[0]
        before = snapshot(self.host)
        answer = self._answer(
            lambda: self.vm.set_memory_region(slot, frame * K, count * K, gmem=self.gmem, offset=first * K),
            self._expect_bind(slot, frame, first, count),
        )
        if isinstance(answer, Refusal):
            assert snapshot(self.host) == before, "S15"
        else:
            self.slots[slot] = (frame, first, count)

    def _expect_bind(self, slot: int, frame: int, first: int, count: int) -> str | None:
        if slot in self.slots:
            return "region.gmem_immutable"
        taken = [range(start, start + size) for start, _, size in self.slots.values()]
        if any(set(frames) & set(range(frame, frame + count)) for frames in taken):
            return "region.overlap"
        bound = [range(page, page + size) for _, page, size in self.slots.values()]
        if any(set(pages) & set(range(first, first + count)) for pages in bound):
            return "bind.overlap"
        return None

    @precondition(lambda self: self.slots)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        self.delete_slot(data.draw(st.sampled_from(sorted(self.slots))))

    @rule(frame=st.integers(0, GUEST_PAGES + PAGES), private=assertions, value=st.none() | values)
    def guest_access(self, frame: int, private: bool | None, value: int | None) -> None:
        engine = self.vcpu.engine
        assert isinstance(engine, ScriptedEngine)
        engine.script.append(Load(frame * K, private) if value is None else Store(frame * K, value, private))
        exit_ = self.vcpu.run()
        page = self._page_at(frame)
        expected = self._expect_guest_fault(page, private)
        if expected is not None:
            assert isinstance(exit_, MemoryFaultExit)
            assert (exit_.refusal.rule, exit_.gpa) == (expected, frame * K)
            engine.script.pop()
            return
        assert isinstance(exit_, HltExit)
        if page is None:
            assert value is not None or engine.loaded[-1] == 0xFF
        elif value is None:
            assert engine.loaded[-1] == page.cell.byte
        else:
            page.cell.byte = value
        if page is not None:
            self._allocated(self.pages.index(page))

    def _page_at(self, frame: int) -> Page | None:
        for start, first, count in self.slots.values():
            if start <= frame < start + count:
                return self.pages[first + frame - start]
        return None

    def _expect_guest_fault(self, page: Page | None, private: bool | None) -> str | None:
        if page is None:  # no memory is shared, and there is no private MMIO
            return "fault.mismatch" if private else None
        state = SHARED if self.released else page.access
        if private is not None and private is not (state is PRIVATE):
            return "fault.mismatch"
        if self.released:
            return "fault.file_gone"
        return "fault.poisoned" if page.poisoned else None

    @rule(frame=st.integers(0, GUEST_PAGES - 1), count=st.integers(1, 3))
    def pre_fault(self, frame: int, count: int) -> None:
        done = 0
        first_refusal = None
        for number in range(frame, frame + count):
            page = self._page_at(number)
            refusal = "prefault.no_slot" if page is None else self._expect_guest_fault(page, None)
            if refusal is not None:
                first_refusal = refusal
                break
            assert page is not None
            self._allocated(self.pages.index(page))
            done += 1
        answer = self._answer(lambda: self.vm.pre_fault(frame * K, count * K), None if done else first_refusal)
        if done:
            assert answer == (count - done) * K

    @precondition(lambda self: self.slots and not self.released)
    @rule(data=st.data(), value=values, count=st.integers(1, 2))
    def populate(self, data: st.DataObject, value: int, count: int) -> None:
        slot = data.draw(st.sampled_from(sorted(self.slots)))
        frame, first, size = self.slots[slot]
        source = self.host.anonymous(2 * K)
        source[0], source[K] = value, value
        done, refused = 0, None
        for number in range(first, first + min(count, size)):
            page = self.pages[number]
            if page.access is SHARED:
                refused = "populate.shared"
                break
            self._allocated(number)
            if page.poisoned:
                refused = "fault.poisoned"
                break
            page.cell.byte = value
            done += 1
        answer = self._answer(lambda: self.vm.populate(frame * K, source, count), None if done else refused)
        if done:
            assert answer == done
        self.host.run(self.host.process.mm.unmap(source.hva, 2 * K))
