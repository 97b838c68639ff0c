"""VirtualMachine: the identity that memory belongs to, which may have more than one struct kvm.

An identity is a number that hardware knows (an ASID, an HKID) and a generation that is never used again. Numbers are
scarce and come back at once, the last freed first; generations are what is compared. Remembering a struct kvm by its
address would accept a stranger whom the allocator gave the same one (seed.md R26, known bug B39).
"""

from __future__ import annotations

import errno
from typing import NamedTuple

from guestmem.arch import Lifetime, Platform
from guestmem.sched import RefCount, Scheduler
from guestmem.trace import Refusal


class Identity(NamedTuple):
    """Equal only for the same virtual machine. `number` is the hardware's, `generation` nobody else ever has."""

    number: int
    generation: int


class IdentityPool:
    """The identities of one host: `count` numbers from 1 on."""

    def __init__(self, count: int = 509) -> None:
        self.live: dict[int, Identity] = {}
        self._count = count
        self._used = 0
        self._free: list[int] = []
        self._generation = 0

    def allocate(self) -> Identity:
        """Raises: Refusal EBUSY `identity.exhausted`, as sev_asid_new() has it."""
        if not self._free:
            if self._used == self._count:
                raise Refusal(errno.EBUSY, "identity.exhausted", live=len(self.live))
            self._used += 1
            self._free.append(self._used)
        self._generation += 1
        identity = Identity(self._free.pop(), self._generation)
        self.live[identity.number] = identity
        return identity

    def adopt(self, identity: Identity) -> None:
        """An identity of before the machine's update is one of its live ones again.

        Raises: Refusal EBUSY `identity.taken` if its number is somebody else's now.
        """
        number = identity.number
        if number in self.live or number > self._count:
            raise Refusal(errno.EBUSY, "identity.taken", number=number)
        while self._used < number:
            self._used += 1
            self._free.append(self._used)
        self._free.remove(number)
        self._generation = max(self._generation, identity.generation)
        self.live[number] = identity

    def free(self, identity: Identity) -> None:
        assert self.live.pop(identity.number, None) == identity, f"S8: {identity} freed but not live"
        self._free.append(identity.number)

    def retire(self, identity: Identity) -> None:
        """As free, and nobody gets the number again: a page that could not be taken back still names it."""
        assert self.live.pop(identity.number, None) == identity, f"S8: {identity} retired but not live"

    def may_come_again(self, identity: Identity) -> bool:
        """Whether its number is somebody else's now, or may be."""
        number = identity.number
        return number in self._free or (number in self.live and self.live[number] != identity)


class VirtualMachine:
    """The owner of memory. Held by each struct kvm that runs it and each inode that belongs to it; its identity is
    recycled when the last has gone.

    That inodes hold it is not so in Linux, where the release of a file puts the struct kvm first and evicts the pages
    afterwards: for a moment pages name an identity that may be somebody else's already. Seed requirement R23 forbids
    that, and the interleaving tests found it here when it was built the kernel's way.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        pool: IdentityPool,
        platform: Platform,
        lifetime: Lifetime = Lifetime.BINDING,
        identity: Identity | None = None,
    ) -> None:
        """`identity`: one that was adopted. Raises: as IdentityPool.allocate."""
        self.identity = identity or pool.allocate()
        self.architecture = platform.new_guest(*self.identity)
        self.lifetime = lifetime
        self.encryption_initialised = False
        self.helpers = 0  # that there ever were
        self.references = RefCount(scheduler, f"virtual machine {self.identity.generation}")
        self._pool = pool

    def get(self) -> None:
        self.references.get()

    def put(self) -> None:
        if self.references.put():
            if self.architecture.teardown():
                self._pool.free(self.identity)
            else:
                self._pool.retire(self.identity)
