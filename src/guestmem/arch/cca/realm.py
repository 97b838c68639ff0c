"""What the Realm Management Monitor (RMM) knows of granules and of realms. Data; the calls are in monitor.py.

Source: Realm Management Monitor specification 1.0 (DEN0137), sections on granules, realms and the RTT.
"""

from __future__ import annotations

import enum
import hashlib
from typing import NamedTuple

from guestmem.memory import Pfn

LEVEL_ROOT, LEVEL_1G, LEVEL_2M, LEVEL_4K = 0, 1, 2, 3
"""Levels of a Realm Translation Table that begins at level 0, as Arm counts: an entry of level 3 maps a page."""
IPA_BITS = 48
PROTECTED_FRAMES = 1 << (IPA_BITS - 1 - 12)
"""The lower half of the guest's addresses is protected, the upper half shared with the host."""


def frames(level: int) -> int:
    """How many frames an entry of a level covers."""
    return 1 << 9 * (LEVEL_4K - level)


class GranuleState(enum.Enum):
    """What a granule is. Only UNDELEGATED ones are in the non-secure address space of the GPT; the rest is Realm."""

    UNDELEGATED = "UNDELEGATED"
    DELEGATED = "DELEGATED"
    RD = "RD"
    REC = "REC"
    DATA = "DATA"
    RTT = "RTT"


class RealmState(enum.Enum):
    NEW = "REALM_NEW"
    ACTIVE = "REALM_ACTIVE"
    SYSTEM_OFF = "REALM_SYSTEM_OFF"


class Hipas(enum.Enum):
    """What the host has put at a protected address (the state of the RTT entry)."""

    UNASSIGNED = "UNASSIGNED"
    ASSIGNED = "ASSIGNED"
    TABLE = "TABLE"


class Ripas(enum.Enum):
    """What the realm was promised to find there."""

    EMPTY = "RIPAS_EMPTY"
    RAM = "RIPAS_RAM"
    DESTROYED = "RIPAS_DESTROYED"


class Rtte(NamedTuple):
    """An RTT entry; `hva` is where a page's bytes are in this program."""

    hipas: Hipas
    ripas: Ripas
    pfn: Pfn = Pfn(0)
    hva: int = 0

    def __fingerprint__(self) -> tuple[str, str, int]:
        return self.hipas.value, self.ripas.value, self.pfn


EMPTY = Rtte(Hipas.UNASSIGNED, Ripas.EMPTY)


class Realm:
    """`tables` has the entries that are not EMPTY, by level and index (frame / frames of an entry)."""

    def __init__(self, rd: Pfn, root: Pfn, parameters: bytes) -> None:
        self.rd = rd
        self.root = root
        self.state = RealmState.NEW
        self.recs: list[Pfn] = []
        self.running: set[Pfn] = set()
        self.tables: tuple[dict[int, Rtte], ...] = ({}, {}, {}, {})
        self.measurement = hashlib.sha256(parameters).digest()

    def get(self, gfn: int, level: int) -> Rtte:
        return self.tables[level].get(gfn // frames(level), EMPTY)

    def set(self, gfn: int, level: int, entry: Rtte) -> None:
        if entry == EMPTY:
            self.tables[level].pop(gfn // frames(level), None)
        else:
            self.tables[level][gfn // frames(level)] = entry

    def walk(self, gfn: int, level: int) -> tuple[int, Rtte]:
        """The level at which a walk for `level` ends, and the entry there."""
        for reached in range(level):
            entry = self.get(gfn, reached)
            if entry.hipas is not Hipas.TABLE:
                return reached, entry
        return level, self.get(gfn, level)

    def children(self, gfn: int, level: int) -> list[Rtte]:
        """The 512 entries of the table whose entries are of `level`."""
        first = gfn // frames(level) // 512 * 512
        return [self.tables[level].get(index, EMPTY) for index in range(first, first + 512)]

    def drop_children(self, gfn: int, level: int) -> None:
        first = gfn // frames(level) // 512 * 512
        for index in range(first, first + 512):
            self.tables[level].pop(index, None)

    def extend(self, kind: int, *fields: int | bytes) -> None:
        """Extend the RIM by a measurement descriptor: kind, its size, the RIM so far, then its fields; 256 bytes."""
        descriptor = kind.to_bytes(8, "little") + (0x100).to_bytes(8, "little") + self.measurement.ljust(64, b"\0")
        for field in fields:
            descriptor += field.ljust(64, b"\0") if isinstance(field, bytes) else field.to_bytes(8, "little")
        self.measurement = hashlib.sha256(descriptor.ljust(0x100, b"\0")).digest()

    def __fingerprint__(self) -> object:
        tables = [sorted(table.items()) for table in self.tables]
        return self.rd, self.state.value, self.recs, sorted(self.running), tables, self.measurement
