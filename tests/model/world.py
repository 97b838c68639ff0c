"""The world of tests/test_model.py: a file of a software-protected VM, and what the model expects of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant

from guestmem.check.invariants import ZeroGhost, check_all, check_every_step
from guestmem.cpu.scripted import ScriptedEngine
from guestmem.host import Gmem, Host, Vm
from guestmem.memory import PAGE_SIZE, Access, PageIndex
from guestmem.trace import Refusal
from guestmem.uapi.kvm import VmType
from guestmem.userspace import BUS_ADRERR, BUS_MCEERR_AR, Process, SigSegv
from tests.model.pages import ORDERS, Cell, Mapping, Page, Pinned, check_shape

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


class World(RuleBasedStateMachine):
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

    # What is expected

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

    def _is_pinned(self, page: int) -> bool:
        """Whether the page that is in the file now is held by a pin (one that a hole has detached is not)."""
        now = self.pages[page]
        return any(held is now and cell is now.cell for pinned in self.pins for held, cell in self._held(pinned))

    @staticmethod
    def _held(pinned: Pinned) -> list[tuple[Page, Cell]]:
        return list(zip(pinned.pages, pinned.cells, strict=True))

    # What more than one kind of call does

    def _maybe_released(self) -> None:
        held = self.fd_open or self.child_has_fd or self.mappings or self.child_mappings
        if held or self.released:
            return
        self.released = True
        assert self.gmem.inode.destroyed
        for first in range(0, PAGES, 1 << self.order):
            if any(page.poisoned for page in self.pages[first : first + (1 << self.order)]):
                self.retired += 1 << self.order

    def delete_slot(self, slot: int) -> None:
        self.vm.set_memory_region(slot, 0, 0)
        del self.slots[slot]

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
