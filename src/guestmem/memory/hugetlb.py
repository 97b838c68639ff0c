"""HugeTLB: huge pages that are set aside before anybody asks, and reservations on them.

A `HugePool` is one hstate: huge pages of one order, per node, none made on demand (no surplus). A `Subpool` is the
reservation of one inode: made for its whole size when it is created, so that no later fault can find the pool empty.

    create     reserved + n                    ENOMEM if fewer than n are free and not reserved
    allocate   free - 1, reserved - 1
    free       free + 1, reserved + 1 while the inode lives
    close      what the inode still has reserved is given up

Counting belongs to the moment at which a page really comes back, which a pin may put off until long after the file and
the VM are gone, and to nobody else: truncation that counts too returns a page twice (known bug B69).

The cgroup counters are those of the hugetlb controller: usage of pages, and reservations.

Source: mm/hugetlb.c (hugetlb_acct_memory, hugepage_subpool_get_pages, free_huge_folio), mm/hugetlb_cgroup.c;
"[RFC PATCH v2 00/51] 1G page support for guest_memfd"; spec/semantics.md section 10.
"""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Iterable, Mapping, Sequence

from guestmem.memory.pages import PAGE_SHIFT, Pfn, Range, block
from guestmem.memory.pool import Pool
from guestmem.memory.vmemmap import Vmemmap, split_cost
from guestmem.trace import Refusal


@dataclasses.dataclass(frozen=True, slots=True)
class HugePoolStatistics:
    """Huge pages of one order; `free_by_node` in the order of the nodes. `used` is also the cgroup's usage, and
    `charged` its reservations: pages that inodes were created for and that have not come back."""

    order: int
    total: int
    free: int
    reserved: int
    used: int
    charged: int
    retired: int
    free_by_node: tuple[int, ...]


class HugePool:
    """Huge pages of one order. `nodes` has how many each NUMA node is to have; their memory is `pool`'s.

    `limit` and `reservation_limit` are the cgroup's, in huge pages; None for none.

    Raises: Refusal ENOMEM `pool.empty`, if the pool is too small for that.
    """

    def __init__(self, pool: Pool, vmemmap: Vmemmap, order: int, nodes: Sequence[int]) -> None:
        self.pool = pool
        self.vmemmap = vmemmap
        self.order = order
        self.free_by_node = list(nodes)
        self.total = sum(nodes)
        self.reserved = 0
        self.charged = 0
        self.retired = 0
        self.limit: int | None = None
        self.reservation_limit: int | None = None
        self._node_of: dict[Pfn, int] = {}  # of huge pages in use; not kept for one node
        pool.set_aside(self.total << order)
        vmemmap.optimise(self.total * self._saved)

    @property
    def free(self) -> int:
        return sum(self.free_by_node)

    @property
    def used(self) -> int:
        """Huge pages that are in a file, or left one and are still held."""
        return self.total - self.free

    @property
    def _saved(self) -> int:
        """Pages of vmemmap that HVO saves on one whole huge page."""
        return split_cost(self.order, 0)

    def reserve(self, count: int) -> None:
        """Raises: Refusal ENOMEM `create.reservation`, `create.cgroup`, with nothing reserved."""
        if count > self.free - self.reserved:
            raise Refusal(
                errno.ENOMEM,
                "create.reservation",
                wanted=count,
                page_size=1 << (self.order + PAGE_SHIFT),
                free=self.free,
                reserved=self.reserved,
            )
        if self.reservation_limit is not None and self.charged + count > self.reservation_limit:
            raise Refusal(
                errno.ENOMEM, "create.cgroup", wanted=count, charged=self.charged, limit=self.reservation_limit
            )
        self.reserved += count
        self.charged += count

    def unreserve(self, count: int) -> None:
        """Give up reservations that were not used."""
        assert count <= self.reserved, "S14: a reservation is given up twice"
        self.reserved -= count
        self.charged -= count

    def take(self, node: int | None = None) -> Range[Pfn]:
        """A reserved huge page, of `node` if it has one. Raises: Refusal ENOMEM `pool.cgroup`."""
        assert self.reserved > 0, "S14: a huge page without a reservation"
        if self.limit is not None and self.used >= self.limit:
            raise Refusal(errno.ENOMEM, "pool.cgroup", used=self.used, limit=self.limit, order=self.order)
        if node is None or not self.free_by_node[node]:
            node = next(number for number, free in enumerate(self.free_by_node) if free)
        self.pool.set_aside(-1 << self.order)
        (page,) = self.pool.allocate(1 << self.order, self.order)
        self.free_by_node[node] -= 1
        self.reserved -= 1
        if len(self.free_by_node) > 1:
            self._node_of[page.start] = node
        return page

    def give(self, page: Range[Pfn], reserve: bool) -> None:
        """A huge page comes back; with `reserve` the reservation that it was taken with comes back too."""
        self.pool.free(page)
        self.pool.set_aside(1 << self.order)
        self.free_by_node[self._node_of.pop(page.start, 0)] += 1
        if reserve:
            self.reserved += 1
        else:
            self.charged -= 1

    def retire(self, page: Range[Pfn]) -> None:
        """A huge page with bad memory in it never comes back: the pool is smaller from now on."""
        self.pool.retire(page)
        self._node_of.pop(page.start, None)
        self.total -= 1
        self.charged -= 1
        self.retired += 1

    def statistics(self) -> HugePoolStatistics:
        return HugePoolStatistics(
            self.order,
            self.total,
            self.free,
            self.reserved,
            self.used,
            self.charged,
            self.retired,
            tuple(self.free_by_node),
        )

    def check(self) -> None:
        """S14: every reservation has a free page, and what is charged is what is reserved or in use."""
        assert all(free >= 0 for free in self.free_by_node), "S14: a node has fewer than no huge pages"
        assert 0 <= self.reserved <= self.free, f"S14: {self.reserved} huge pages reserved, {self.free} free"
        assert self.charged == self.reserved + self.used, "S14: the cgroup and the pool disagree"


class Subpool:
    """The huge pages of one inode: where its folios come from. `reserved` are not in use.

    Raises: Refusal ENOMEM `create.reservation`, `create.cgroup`.
    """

    def __init__(self, huge: HugePool, count: int) -> None:
        huge.reserve(count)
        self.huge = huge
        self.pool = huge.pool
        self.reserved = count
        self.closed = False

    def allocate(self, pages: int, order: int) -> list[Range[Pfn]]:
        """One huge page. Raises: Refusal ENOMEM `pool.cgroup`; `pool.no_huge_page` if a reserved one went bad."""
        assert pages == 1 << order == 1 << self.huge.order, "a huge page at a time"
        if not self.reserved:
            raise Refusal(errno.ENOMEM, "pool.no_huge_page", order=order)
        page = self.huge.take()
        self.reserved -= 1
        return [page]

    def free(self, pfns: Range[Pfn]) -> None:
        """Whole huge pages come back, to the reservation while the inode lives."""
        for start in range(pfns.start, pfns.end, 1 << self.huge.order):
            self.huge.give(block(Pfn(start), self.huge.order), reserve=not self.closed)
            if not self.closed:
                self.reserved += 1

    def retire(self, pfns: Range[Pfn]) -> None:
        self.huge.retire(pfns)

    def restore(self, vmemmap: int) -> None:
        """Raises: Refusal ENOMEM `split.vmemmap`."""
        self.huge.vmemmap.restore(vmemmap)

    def optimise(self, vmemmap: int) -> None:
        self.huge.vmemmap.optimise(vmemmap)

    def close(self) -> None:
        """The inode is gone: what it has reserved and not in use is given up. What is pinned comes back later."""
        self.closed = True
        self.huge.unreserve(self.reserved)
        self.reserved = 0


class Hugetlb:
    """All huge pages of a host, by order."""

    def __init__(self, pool: Pool, pages: Mapping[int, int | Sequence[int]]) -> None:
        """`pages`: order to how many there are, or how many each node has. Raises: Refusal ENOMEM `pool.empty`."""
        self._pool = pool
        self.vmemmap = Vmemmap(pool)
        self.pools: dict[int, HugePool] = {}
        for order, nodes in sorted(pages.items()):
            self.add(order, nodes)

    def add(self, order: int, nodes: int | Sequence[int]) -> None:
        """Set aside huge pages of an order that has none yet. Raises: Refusal ENOMEM `pool.empty`."""
        assert order not in self.pools, "this order has its huge pages"
        self.pools[order] = HugePool(self._pool, self.vmemmap, order, [nodes] if isinstance(nodes, int) else nodes)

    def subpool(self, order: int, count: int) -> Subpool:
        """Raises: Refusal ENOMEM `create.reservation`, `create.cgroup`."""
        if order not in self.pools:
            page_size = 1 << (order + PAGE_SHIFT)
            raise Refusal(errno.ENOMEM, "create.reservation", wanted=count, page_size=page_size, free=0, reserved=0)
        return Subpool(self.pools[order], count)

    def statistics(self) -> dict[int, HugePoolStatistics]:
        return {order: pool.statistics() for order, pool in self.pools.items()}

    def text(self) -> str:
        """The counters under the names of /sys/kernel/mm/hugepages, of the hugetlb cgroup, and of vmemmap's (pages)."""
        return "\n".join((*self._lines(), *self._vmemmap_lines()))

    def check(self) -> None:
        for pool in self.pools.values():
            pool.check()

    def _lines(self) -> Iterable[str]:
        for pool in self.pools.values():
            now = pool.statistics()
            size = 1 << (pool.order + PAGE_SHIFT)
            name = f"hugepages-{size >> 10}kB"
            cgroup = f"hugetlb.{size >> 20}MB" if size < 1 << 30 else f"hugetlb.{size >> 30}GB"
            yield f"{name}/nr_hugepages {now.total}"
            yield f"{name}/free_hugepages {now.free}"
            yield f"{name}/resv_hugepages {now.reserved}"
            yield f"{name}/surplus_hugepages 0"
            for node, free in enumerate(now.free_by_node):
                yield f"node{node}/{name}/free_hugepages {free}"
            yield f"{cgroup}.current {now.used * size}"
            yield f"{cgroup}.rsvd.current {now.charged * size}"

    def _vmemmap_lines(self) -> Iterable[str]:
        yield f"vmemmap/saved {self.vmemmap.saved}"
        yield f"vmemmap/optimised {self.vmemmap.optimised}"
        yield f"vmemmap/restored {self.vmemmap.restored}"
