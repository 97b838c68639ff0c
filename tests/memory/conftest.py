"""A provider by itself: no KVM, no process (R13)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

import pytest

from guestmem.memory import (
    ORDER_1G,
    PAGE_SIZE,
    Abilities,
    Access,
    HugePolicy,
    Hugetlb,
    Inode,
    Invalidation,
    MemfdBacking,
    Page,
    PageIndex,
    Pool,
    Range,
    Registration,
)
from guestmem.sched import Policy, Scheduler
from guestmem.trace import Tracer
from guestmem.trace.events import Event

T = TypeVar("T")


@dataclasses.dataclass
class RecordingUser:
    """A user of memory that notes what it is told. The fourth, which needs no change in the core (R1)."""

    kind: str = "dummy"
    may_map_private: bool = True
    takes_references: bool = False
    told: list[tuple[str, Invalidation]] = dataclasses.field(default_factory=list)
    on_begin: Callable[[Invalidation], None] = lambda invalidation: None

    async def invalidate_begin(self, invalidation: Invalidation) -> None:
        self.told.append(("begin", invalidation))
        self.on_begin(invalidation)

    async def invalidate_end(self, invalidation: Invalidation) -> None:
        self.told.append(("end", invalidation))


class Provider:
    """One inode and what it needs."""

    def __init__(
        self,
        pages: int = 16,
        *,
        init_shared: bool = False,
        capacity: int = 64,
        order: int = 0,
        policy: Policy | None = None,
        hugepages: int | list[int] | None = None,
        orders: tuple[int, ...] = (18, 9, 0),
        huge_policy: HugePolicy | None = None,
    ) -> None:
        self.scheduler = Scheduler(policy)
        self.tracer = Tracer()
        self.events: list[Event] = []
        self.tracer.listen(self.events.append)
        self.pool = Pool(capacity)
        huge_pages = hugepages if hugepages is not None else pages >> order
        self.hugetlb = Hugetlb(self.pool, {order: huge_pages} if order else {})
        source = self.hugetlb.subpool(order, pages >> order) if order else self.pool
        self.backing = MemfdBacking(pages, "test", junk=order < ORDER_1G)  # junk in gigabytes takes seconds
        self.inode = Inode(
            self.scheduler,
            self.tracer,
            source,
            self.backing,
            number=1,
            size=pages * PAGE_SIZE,
            abilities=Abilities(mmap=True, init_shared=init_shared, convertible=True),
            orders=tuple(smaller for smaller in orders if smaller <= order),
            policy=huge_policy or HugePolicy(),
        )

    def run(self, coroutine: Coroutine[Any, None, T], name: str = "test") -> T:
        return self.scheduler.run(coroutine, name)

    async def fault(self, registration: Registration, index: int, access: Access) -> Page:
        async with self.inode.invalidate_lock.shared:
            return await self.inode.fault(registration, PageIndex(index), access)

    def convert(self, start: int, end: int, to: Access) -> None:
        self.run(self.inode.convert(pages(start, end), to))

    def close(self) -> None:
        self.scheduler.close()
        if not self.inode.destroyed:
            self.run(self.inode.put())


def pages(start: int, end: int) -> Range[PageIndex]:
    return Range(PageIndex(start), PageIndex(end))


@pytest.fixture
def provider() -> Iterator[Provider]:
    made = Provider()
    yield made
    made.close()
    assert made.pool.statistics().allocated == made.pool.statistics().retired
