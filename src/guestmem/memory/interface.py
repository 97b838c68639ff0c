"""What an inode takes from its creator and gives to its users: values, and the one thing that it asks of its owner."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import NamedTuple, Protocol

from guestmem.memory.pages import Pfn


@dataclasses.dataclass(frozen=True, slots=True)
class Abilities:
    """What the users of an inode may do, fixed by its creator (R14). The provider never asks what the creator is.

    `mmap`: userspace may map it. `init_shared`: pages are born shared. `convertible`: access may be changed.
    """

    mmap: bool
    init_shared: bool
    convertible: bool


class Owner(Protocol):
    """The virtual machine that memory belongs to; all that the provider knows of it. Held until the memory is gone."""

    @property
    def identity(self) -> Hashable:
        """Compared, never looked into (R28)."""
        ...

    def get(self) -> None: ...

    def put(self) -> None: ...


class Page(NamedTuple):
    """What a fault gives: page number, order of the largest mapping, the server's address of the 4K page, and the
    window (base, size in bytes) of the server's memory that this address is in."""

    pfn: Pfn
    order: int
    hva: int
    window: tuple[int, int]

    def __fingerprint__(self) -> tuple[int, int]:
        """Without addresses: where the host put the file is not state."""
        return self.pfn, self.order


@dataclasses.dataclass(frozen=True, slots=True)
class InodeStatistics:
    """Pages of 4 KiB; counts since creation. `faults` by kind of user and access, `invalidations` by reason."""

    number: int
    size: int
    allocated: int
    allocated_peak: int
    private: int
    poisoned: int
    conversions: int
    faults: dict[tuple[str, str], int]
    invalidations: dict[str, int]
