"""Whom the provider tells, and what: the one kind of call that leaves guest_memfd.

A user of memory (host page tables, KVM, an IOMMU) registers and from then on is told, with `invalidate_begin`, to drop
its mappings of a range before their meaning changes, and with `invalidate_end` that it may map the range again. Between
the two it installs nothing there; `Window` is how. There is no return value: a user that cannot unmap raises
`UnmapFailed`, the pages are recorded as bad, and the provider looks at that record before it goes on.

Shaped like MMU notifiers (include/linux/mmu_notifier.h), with a reason as Jason Gunthorpe and Vishal Annapurve asked
for (seed.md Q6). The road not taken: return codes or vetoes from users; both were refused on the list as foreign to
the kernel.
"""

from __future__ import annotations

import dataclasses
import enum
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Generic, Protocol

from guestmem.memory.pages import N, PageRange, Range
from guestmem.sched import Scheduler, SeqCount, Srcu
from guestmem.trace import Tracer
from guestmem.trace import events as event


class Access(enum.Enum):
    """Who may reach a page. A page has one, a fault asks for one, a mapping was made with one."""

    SHARED = "shared"
    PRIVATE = "private"


BOTH = (Access.SHARED, Access.PRIVATE)


class Reason(enum.Enum):
    """Why mappings must go."""

    CONVERT_TO_PRIVATE = "convert to private"
    CONVERT_TO_SHARED = "convert to shared"
    TRUNCATE = "truncate"
    RELEASE = "release"
    POISON = "poison"


@dataclasses.dataclass(frozen=True, slots=True)
class Invalidation:
    """One notification: mappings of `pages` made with one of `accesses` must go, because of `reason`.

    For a conversion `accesses` is the old access alone, for everything else it is both: it follows the state of the
    pages and not how the file was created (known bug B19).

    `hull`, if it differs, is `pages` rounded out to the huge pages that they are a part of. Nothing is zapped there
    that does not meet `pages`, but nothing may be installed: a leaf over all of a huge page would span both accesses
    (S13).
    """

    pages: PageRange
    reason: Reason
    accesses: tuple[Access, ...]
    hull: PageRange | None = None


class UnmapFailed(Exception):
    """Raised by a user inside `invalidate_begin`: it could not drop its mappings of `pages`."""

    def __init__(self, pages: PageRange, why: str) -> None:
        self.pages = pages
        super().__init__(f"pages {pages.start:#x}..{pages.end:#x} stay mapped: {why}")


class MemoryUser(Protocol):
    """What a user of memory implements.

    `kind` names it in traces and statistics. `may_map_private` is false for a user that must never see a private page.
    `takes_references` says whether folios can be pinned through its mappings: such a user is told first, so that no
    new pin can appear while the provider looks for old ones.
    """

    kind: str
    may_map_private: bool
    takes_references: bool

    async def invalidate_begin(self, invalidation: Invalidation) -> None:
        """Let nothing new in, drop what is there, flush what caches it."""
        ...

    async def invalidate_end(self, invalidation: Invalidation) -> None:
        """The range may be mapped again. Called once for each begin, with the same argument."""
        ...


class Registration:
    """The tie between an inode's users and one of them; what a fault is made through."""

    __slots__ = ("_users", "last", "user")

    def __init__(self, users: Users, user: MemoryUser, last: bool) -> None:
        self._users = users
        self.user = user
        self.last = last

    async def unregister(self) -> None:
        """End it. Returns when no notification to the user is in flight (S20, L6)."""
        await self._users.unregister(self)


class Users:
    """Who must be told about one inode. `open` are the invalidations on their way."""

    def __init__(
        self, scheduler: Scheduler, tracer: Tracer, inode: int, unmap_failed: Callable[[PageRange], None]
    ) -> None:
        self.registrations: list[Registration] = []
        self.invalidations: Counter[str] = Counter()
        self.open: list[Telling] = []
        self._inode = inode
        self._tracer = tracer
        self.srcu = Srcu(scheduler, f"users of inode {inode}")
        self._unmap_failed = unmap_failed

    def register(self, user: MemoryUser, *, last: bool = False) -> Registration:
        """`last`: told when all others have been, and only if they could unmap; for who gives pages back."""
        registration = Registration(self, user, last)
        place = len(self.registrations)
        while not last and place and self.registrations[place - 1].last:
            place -= 1
        self.registrations.insert(place, registration)
        return registration

    async def unregister(self, registration: Registration) -> None:
        self.registrations.remove(registration)
        await self.srcu.synchronize()

    def tell(self, invalidation: Invalidation) -> Telling:
        """`async with users.tell(invalidation) as telling:` a window; begin it with `await telling.begin()`.

        Leaving the block ends it for exactly those users for whom it was begun, whatever happened (S4).
        """
        self.invalidations[invalidation.reason.value] += 1
        return Telling(self, invalidation)

    async def begin(self, registration: Registration, invalidation: Invalidation) -> None:
        if self._tracer.enabled:
            self._tracer.emit(event.GmemInvalidateBegin(*self._fields(registration, invalidation)))
        try:
            await registration.user.invalidate_begin(invalidation)
        except UnmapFailed as failure:
            self._unmap_failed(failure.pages)

    async def end(self, registration: Registration, invalidation: Invalidation) -> None:
        await registration.user.invalidate_end(invalidation)
        if self._tracer.enabled:
            self._tracer.emit(event.GmemInvalidateEnd(*self._fields(registration, invalidation)))

    def _fields(self, registration: Registration, invalidation: Invalidation) -> tuple[int, int, int, str, str, str]:
        accesses = "+".join(access.value for access in invalidation.accesses)
        pages = invalidation.pages
        return self._inode, pages.start, pages.end, invalidation.reason.value, accesses, registration.user.kind


class Telling:
    """One invalidation on its way through the users. They are those who were registered when it was entered.

    `told` are those whose window is open, or opening.
    """

    __slots__ = ("_section", "_untold", "_users", "invalidation", "told")

    def __init__(self, users: Users, invalidation: Invalidation) -> None:
        self._users = users
        self.invalidation = invalidation
        self.told: list[Registration] = []

    async def __aenter__(self) -> Telling:
        self._section = self._users.srcu.read()
        self._section.__enter__()
        self._untold = list(self._users.registrations)
        self._users.open.append(self)
        return self

    async def begin(self, through_references: bool = False, last: bool = True) -> None:
        """Tell every user that was not told yet; with `through_references` those alone that hand out references,
        without `last` not those who wanted to be told last."""
        for registration in list(self._untold):
            if (through_references and not registration.user.takes_references) or (registration.last and not last):
                continue
            self._untold.remove(registration)
            self.told.append(registration)
            await self._users.begin(registration, self.invalidation)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            while self.told:
                await self._users.end(self.told[-1], self.invalidation)
                self.told.pop()
        finally:
            self._users.open.remove(self)
            self._section.__exit__(kind, error, trace)


class Window(Generic[N]):
    """Keeps mappings out of ranges that are being invalidated, in the numbers of the user's own address space.

    A lookup notes `sequence` before it starts. Whoever installs what it found asks `blocks` first, under the lock that
    `begin` and `end` are called under; if it says yes the lookup is void. Several windows may be open at once; their
    hull is kept, as the kernel does, since a needless retry is harmless.

    Source: virt/kvm/kvm_main.c, kvm_mmu_invalidate_begin/end/range_add, mmu_invalidate_retry_gfn.
    """

    __slots__ = ("hull", "open", "sequence")

    def __init__(self, name: str) -> None:
        self.sequence = SeqCount(name)
        self.open = 0
        self.hull: Range[N] | None = None

    def begin(self, numbers: Range[N]) -> None:
        self.open += 1
        if self.hull is None:
            self.hull = numbers
        else:
            self.hull = Range(min(self.hull.start, numbers.start), max(self.hull.end, numbers.end))

    def end(self) -> None:
        assert self.open > 0, f"S4: {self.sequence.name}: end without begin"
        self.sequence.bump()
        self.open -= 1
        if not self.open:
            self.hull = None

    def blocks(self, seen: int, numbers: Range[N]) -> bool:
        """Whether a leaf over `numbers`, from a lookup that noted sequence `seen`, may no longer be installed."""
        if self.hull is not None and self.hull.overlaps(numbers):
            return True
        return self.sequence.moved_since(seen)
