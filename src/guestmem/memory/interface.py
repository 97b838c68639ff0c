"""What an inode takes from its creator and gives to its users: values, and the one thing that it asks of its owner."""

from __future__ import annotations

import dataclasses
import enum
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


class Split(enum.Enum):
    """How far a huge page is split when a part of it becomes shared.

    LAZY: 1G to 2M, and only the 2M that holds the shared page to 4K. WHOLE: all of it to 4K, as in the posted series.
    """

    LAZY = "lazy"
    WHOLE = "whole"


class Conversion(enum.Enum):
    """What a conversion that cannot be done for every page does.

    ATOMIC: nothing. STEPWISE: it goes one huge page at a time and stops at the first that cannot be converted.
    """

    ATOMIC = "atomic"
    STEPWISE = "stepwise"


@dataclasses.dataclass(frozen=True, slots=True)
class HugePolicy:
    """What a file of huge pages does where the postings differ."""

    split: Split = Split.LAZY
    conversion: Conversion = Conversion.ATOMIC


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
    """Pages of 4 KiB; counts since creation. `faults` by kind of user and access, `invalidations` by reason.

    `folios` has how many there are now, `splits` how many were split and `merges` how many came of merging, by order.
    `memory` is what the host has behind it: hugetlb 2M, memfd+THP, memfd, ...
    """

    number: int
    size: int
    allocated: int
    allocated_peak: int
    private: int
    poisoned: int
    conversions: int
    faults: dict[tuple[str, str], int]
    invalidations: dict[str, int]
    order: int
    folios: dict[int, int]
    splits: dict[int, int]
    merges: dict[int, int]
    memory: str
