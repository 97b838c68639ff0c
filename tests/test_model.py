"""The whole house against a dict of pages: provider, KVM and userspace under any sequence of calls (S21).

The model knows nothing of folios, leaves or locks: a page has an access, a cell of content, and may be allocated or
poisoned. Every call's answer is predicted from that, value or rule, and after every call the properties, every room's
own `check()`, and the model's picture of the file must hold.

`GUESTMEM_EXAMPLES` sets how many examples each of the four shards runs (default 1250, so 5,000 together), and turns
the fixed seed off.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from guestmem.check.invariants import ZeroGhost, check_all, check_every_step, snapshot
from guestmem.cpu.scripted import Load, ScriptedEngine, Store
from guestmem.host import Gmem, Host, Vm
from guestmem.kvm.exits import HltExit, MemoryFaultExit
from guestmem.memory import PAGE_SIZE, Access, PageIndex
from guestmem.trace import Refusal
from guestmem.uapi.kvm import VmType
from guestmem.userspace import BUS_ADRERR, BUS_MCEERR_AR, Pin, Process, SigBus, SigSegv
from tests.model_pages import ORDERS, Cell, Mapping, Page, Pinned, check_shape

K = PAGE_SIZE
PAGES = 8
GUEST_PAGES = 10
SLOTS = 3
PRIVATE, SHARED = Access.PRIVATE, Access.SHARED

page_numbers = st.integers(0, PAGES - 1)
ranges = st.tuples(page_numbers, st.integers(1, PAGES)).map(lambda pair: (pair[0], min(sum(pair), PAGES)))
values = st.integers(1, 255)
accesses = st.sampled_from([PRIVATE, SHARED])
assertions = st.sampled_from([None, None, True, False])


class SmallHost(Host):
    orders = ORDERS


class GuestMemory(RuleBasedStateMachine):
    """One file of a software-protected VM, of single pages or of huge ones, two processes, three slots, one guest."""

    def __init__(self) -> None:
        super().__init__()
        self.host = SmallHost(
            memory=4096 * K,
            engine=lambda memory: ScriptedEngine(memory, []),
            debug=True,
            hugepages={order: PAGES >> order for order in ORDERS if order},
        )
        ZeroGhost(self.host.tracer)
        check_every_step(self.host)
        self.vm: Vm = self.host.create_vm(VmType.SW_PROTECTED)
        self.vcpu = self.vm.create_vcpu()
        self.slots: dict[int, tuple[int, int, int]] = {}  # slot -> (first frame, first page, pages)
        self.child: Process | None = None
        self.child_mappings: list[Mapping] = []
        self.mappings: list[Mapping] = []
        self.pins: list[Pinned] = []
        self.retired = 0

    @initialize(init_shared=st.booleans(), order=st.sampled_from((0, 0, 1, 2)))
    def create(self, init_shared: bool, order: int) -> None:
        if order and self.host.hugetlb.pools[order].free < PAGES >> order:  # some went bad, or are pinned
            order = 0
        self.order = order
        self.gmem: Gmem = self.vm.create_guest_memfd(PAGES * K, mmap=True, init_shared=init_shared, order=order)
        self.pages = [Page(SHARED if init_shared else PRIVATE) for _ in range(PAGES)]
        self.fd_open = True
        self.child_has_fd = False
        self.released = False

    # The host

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

    def _allocated(self, page: int) -> None:
        """A page is there, and with it all of its huge page."""
        for number in self._huge_page(page):
            self.pages[number].allocated = True

    def _huge_page(self, page: int) -> range:
        first = page >> self.order << self.order
        return range(first, first + (1 << self.order))

    def _expect_host_fault(self, page: int) -> int | None:
        if page >= PAGES or self.pages[page].access is PRIVATE:
            return BUS_ADRERR
        return BUS_MCEERR_AR if self.pages[page].poisoned else None

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

    def _is_pinned(self, page: int) -> bool:
        """Whether the page that is in the file now is held by a pin (one that a hole has detached is not)."""
        now = self.pages[page]
        return any(held is now and cell is now.cell for pinned in self.pins for held, cell in self._held(pinned))

    @staticmethod
    def _held(pinned: Pinned) -> list[tuple[Page, Cell]]:
        return list(zip(pinned.pages, pinned.cells, strict=True))

    # The file

    @precondition(lambda self: self.fd_open)
    @rule(pages=ranges, to=accesses)
    def convert(self, pages: tuple[int, int], to: Access) -> None:
        start, end = pages
        busy = None
        if to is PRIVATE and any(self.pages[page].access is not to for page in range(start, end)):
            busy = next((page for page in range(start, end) if self._is_pinned(page)), None)
        before = snapshot(self.host)
        refusal = self._answer(
            lambda: self.gmem.convert(start * K, (end - start) * K, to), "convert.busy" if busy is not None else None
        )
        if isinstance(refusal, Refusal):
            assert refusal.facts["error_offset"] == (busy or 0) * K
            assert snapshot(self.host) == before, "S15"
            return
        for page in range(start, end):
            self.pages[page].access = to

    @precondition(lambda self: self.fd_open)
    @rule(pages=ranges)
    def allocate(self, pages: tuple[int, int]) -> None:
        whole = all(edge % (1 << self.order) == 0 for edge in pages)
        rule_expected = None if whole else "fallocate.unaligned"
        self._answer(lambda: self.gmem.allocate(pages[0] * K, (pages[1] - pages[0]) * K), rule_expected)
        for page in range(*pages) if whole else ():
            self._allocated(page)

    @precondition(lambda self: self.fd_open)
    @rule(pages=ranges, beyond=st.integers(0, 2))
    def punch_hole(self, pages: tuple[int, int], beyond: int) -> None:
        inside = range(pages[0], min(pages[1] + beyond, PAGES))
        whole = [page for page in inside if all(other in inside for other in self._huge_page(page))]
        if self.order and any(self.pages[page].poisoned for page in whole):
            return  # the file would have fewer huge pages than its size from then on: test_huge_pages.py
        busy = bool(self.order) and any(self._is_pinned(page) for page in whole)
        before = snapshot(self.host)
        call = self._answer(
            lambda: self.gmem.punch_hole(pages[0] * K, (pages[1] - pages[0] + beyond) * K),
            "punch.busy" if busy else None,
        )
        if isinstance(call, Refusal):
            assert snapshot(self.host) == before, "S15"
            return
        for page in inside:
            if page in whole:
                self.retired += self.pages[page].poisoned
                self.pages[page] = Page(self.pages[page].access)
            else:  # a part of a huge page: zeroed where it is, for those who hold it too
                self.pages[page].cell.byte = 0

    @precondition(lambda self: not self.released and self.retired < 20)
    @rule(page=page_numbers)
    def memory_failure(self, page: int) -> None:
        folio = self.gmem.inode.folios.folio(PageIndex(page))
        done = self.host.run(self.gmem.inode.memory_failure(PageIndex(page)))
        assert done == self.pages[page].allocated
        for number in range(folio.start, folio.end) if done else ():
            self.pages[number].poisoned = True

    @precondition(lambda self: self.fd_open)
    @rule()
    def close(self) -> None:
        self.gmem.close()
        self.fd_open = False
        self._maybe_released()

    def _maybe_released(self) -> None:
        held = self.fd_open or self.child_has_fd or self.mappings or self.child_mappings
        if held or self.released:
            return
        self.released = True
        assert self.gmem.inode.destroyed
        for first in range(0, PAGES, 1 << self.order):
            if any(page.poisoned for page in self.pages[first : first + (1 << self.order)]):
                self.retired += 1 << self.order

    @precondition(lambda self: self.released)
    @rule(init_shared=st.booleans(), order=st.sampled_from((0, 0, 1, 2)))
    def create_another(self, init_shared: bool, order: int) -> None:
        for slot in list(self.slots):
            self.delete_slot(slot)
        for pinned in self.pins:
            pinned.pages = [Page(SHARED) for _ in pinned.pages]
        self.create(init_shared, order)

    # Memslots and the guest

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

    def delete_slot(self, slot: int) -> None:
        self.vm.set_memory_region(slot, 0, 0)
        del self.slots[slot]

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

    # After every call

    @invariant()
    def everything_holds(self) -> None:
        check_all(self.host)
        self.host.check()
        if not hasattr(self, "pages") or self.released:
            return
        inode = self.gmem.inode
        for number, page in enumerate(self.pages):
            assert inode.access_at(PageIndex(number)) is page.access
            assert (number in inode.folios.present) == page.allocated
            assert (number in inode.folios.poisoned) == page.poisoned
            assert (number in inode.folios.references) == self._is_pinned(number)
        check_shape(inode, self.pages)
        assert self.host.pool.statistics().retired == self.retired

    def teardown(self) -> None:
        for pinned in self.pins:
            pinned.pin.unpin()
        if self.child is not None:
            self.host.run(self.child.exit())
        self.host.close()
        pool = self.host.pool.statistics()
        assert pool.allocated == pool.retired, "L3"
        for huge in self.host.hugetlb.statistics().values():
            assert (huge.used, huge.reserved, huge.charged) == (0, 0, 0), "L3"
        assert not self.host.identities.live, "L3"
        assert all(inode.destroyed for inode in self.host.inodes)
        assert all(vm.destroyed for vm in self.host.vms)

    # Helpers

    @staticmethod
    def _pick(data: st.DataObject, mappings: list[Mapping]) -> tuple[Mapping, int]:
        mapping = data.draw(st.sampled_from(mappings))
        return mapping, mapping.first + data.draw(st.integers(0, mapping.pages - 1))

    @staticmethod
    def _answer(call: Callable[[], Any], expected_rule: str | None) -> Any:
        """What `call` returns, or its refusal, which must be the expected one."""
        try:
            result = call()
        except Refusal as refusal:
            assert refusal.rule == expected_rule, refusal
            return refusal
        except SigSegv as segv:
            raise AssertionError(segv) from segv
        assert expected_rule is None, f"not refused by {expected_rule}"
        return result


EXAMPLES = os.environ.get("GUESTMEM_EXAMPLES")
SETTINGS = settings(
    max_examples=int(EXAMPLES or 1250),
    stateful_step_count=25,
    deadline=None,
    derandomize=EXAMPLES is None,
    suppress_health_check=list(HealthCheck),
)


def shard(name: str) -> type:
    """A test class of its own: another fixed seed, and another worker's business."""
    machine: Any = type(name, (GuestMemory,), {})
    case: type = machine.TestCase
    case.settings = SETTINGS  # type: ignore[attr-defined]
    case.__name__ = case.__qualname__ = f"Test{name}"
    return case


TestModelOne = shard("ModelOne")
TestModelTwo = shard("ModelTwo")
TestModelThree = shard("ModelThree")
TestModelFour = shard("ModelFour")
