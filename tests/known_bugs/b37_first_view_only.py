"""B37: an inode has one context although several struct kvm view it: only the first is told."""

from guestmem.check.mutants import mutant
from guestmem.kvm.context import KvmGmemContext
from guestmem.memory.notifier import Telling


@mutant("B37", replaces="guestmem.memory.notifier:Telling.begin", breaks={"S1", "S2", "S3", "S10"})
async def first_view_only(self: Telling, through_references: bool = False, last: bool = True) -> None:
    """invalidate only list_first(files)."""
    views = 0
    for registration in list(self._untold):
        if (through_references and not registration.user.takes_references) or (registration.last and not last):
            continue
        self._untold.remove(registration)
        if isinstance(registration.user, KvmGmemContext):
            views += 1
            if views > 1:
                continue
        self.told.append(registration)
        await self._users.begin(registration, self.invalidation)
