"""RefCount and SeqCount: the two counters that the kernel's lifetime and retry rules are made of."""

from __future__ import annotations

from guestmem.sched.scheduler import Operation, Scheduler, park


class RefCount:
    """How many hold an object. Starts at one, the creator's; at zero the object is dying and cannot be had again.

    Source: include/linux/refcount.h; `get_unless_zero` is the get_file_active() of a memslot's weak file pointer.
    """

    __slots__ = ("_scheduler", "name", "value")

    def __init__(self, scheduler: Scheduler, name: str, value: int = 1) -> None:
        self._scheduler = scheduler
        self.name = name
        self.value = value

    def __repr__(self) -> str:
        return f"{self.name}={self.value}"

    def get(self) -> None:
        """One more holder; the caller holds one already."""
        assert self.value > 0, f"S6: {self.name}: reference taken from zero"
        self.value += 1

    def get_unless_zero(self) -> bool:
        """One more holder unless the object is dying."""
        if self.value == 0:
            return False
        self.value += 1
        return True

    def put(self) -> bool:
        """One holder less; true for the last, whose duty the release is."""
        assert self.value > 0, f"S14: {self.name}: put without a reference"
        self.value -= 1
        return self.value == 0

    async def wait_until(self, value: int) -> None:
        """Wait until exactly `value` holders are left."""
        if self._scheduler.explores or self.value != value:
            await park(Operation("wait for references", self, lambda: self.value == value))


class SeqCount:
    """A sequence number: a lookup made under an older one is void. Source: kvm->mmu_invalidate_seq."""

    __slots__ = ("name", "value")

    def __init__(self, name: str) -> None:
        self.name = name
        self.value = 0

    def __repr__(self) -> str:
        return f"{self.name}={self.value}"

    def read(self) -> int:
        return self.value

    def bump(self) -> None:
        self.value += 1

    def moved_since(self, seen: int) -> bool:
        return self.value != seen
