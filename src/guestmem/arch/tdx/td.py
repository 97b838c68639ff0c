"""A TD as the module knows it: TDR, TDCS, vCPUs, Secure EPT. Data; the calls are in manage.py and memory_calls.py."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
from typing import NamedTuple

from guestmem.arch.tdx.parameters import DEFAULT_PARAMS
from guestmem.memory import Pfn

LEVEL_4K, LEVEL_2M, LEVEL_1G, LEVEL_ROOT = 0, 1, 2, 3
"""Levels of a Secure EPT of four levels: an entry of level n maps 512**n pages. The root's entries are of level 3."""


class Lifecycle(enum.Enum):
    """TDR.LIFECYCLE_STATE: the state of the TD's key."""

    HKID_ASSIGNED = "TD_HKID_ASSIGNED"
    KEYS_CONFIGURED = "TD_KEYS_CONFIGURED"
    BLOCKED = "TD_BLOCKED"
    TEARDOWN = "TD_TEARDOWN"


class OpState(enum.Enum):
    """TDCS.OP_STATE, without the states of migration."""

    UNINITIALIZED = "UNINITIALIZED"
    INITIALIZED = "INITIALIZED"
    RUNNABLE = "RUNNABLE"


class Sept(enum.Enum):
    """State of a Secure EPT entry, without those of migration and of nested guests. NL: it points to an S-EPT page."""

    NL_MAPPED = "NL_MAPPED"
    NL_BLOCKED = "NL_BLOCKED"
    MAPPED = "MAPPED"
    BLOCKED = "BLOCKED"
    PENDING = "PENDING"
    PENDING_BLOCKED = "PENDING_BLOCKED"

    @property
    def leaf(self) -> bool:
        return self not in (Sept.NL_MAPPED, Sept.NL_BLOCKED)

    @property
    def blocked(self) -> bool:
        return self in BLOCKED_FROM.values()


BLOCKED_FROM = {Sept.NL_MAPPED: Sept.NL_BLOCKED, Sept.MAPPED: Sept.BLOCKED, Sept.PENDING: Sept.PENDING_BLOCKED}
UNBLOCKED = {blocked: state for state, blocked in BLOCKED_FROM.items()}


class SeptEntry(NamedTuple):
    """An entry that is not free. `hva` is where the page's bytes are in this program."""

    state: Sept
    pfn: Pfn
    hva: int = 0

    def __fingerprint__(self) -> tuple[str, int]:
        return self.state.value, self.pfn


class SecureEpt:
    """Entries by level and index (gfn >> 9*level). The root is part of the TDCS."""

    def __init__(self) -> None:
        self.levels: tuple[dict[int, SeptEntry], ...] = ({}, {}, {}, {})

    def get(self, gfn: int, level: int) -> SeptEntry | None:
        return self.levels[level].get(gfn >> 9 * level)

    def set(self, gfn: int, level: int, entry: SeptEntry | None) -> None:
        if entry is None:
            self.levels[level].pop(gfn >> 9 * level, None)
        else:
            self.levels[level][gfn >> 9 * level] = entry

    def reached(self, gfn: int, level: int) -> int:
        """The level at which a walk for the entry of `level` ends: above it, if a table on the way is missing."""
        for above in range(LEVEL_ROOT, level, -1):
            entry = self.get(gfn, above)
            if entry is None or entry.state is not Sept.NL_MAPPED:
                return above
        return level

    def leaf(self, gfn: int) -> tuple[int, SeptEntry] | None:
        """The leaf over a frame, whatever its size and state, with its level."""
        for level in (LEVEL_4K, LEVEL_2M, LEVEL_1G):
            entry = self.get(gfn, level)
            if entry is not None and entry.state.leaf:
                return level, entry
        return None

    def children(self, gfn: int, level: int) -> dict[int, SeptEntry]:
        """The entries that are not free in the S-EPT page under an entry of `level`, by index."""
        first = gfn >> 9 * level << 9
        below = self.levels[level - 1]
        if len(below) < 512:
            return {index: entry for index, entry in below.items() if first <= index < first + 512}
        return {index: below[index] for index in range(first, first + 512) if index in below}


@dataclasses.dataclass(slots=True)
class TdVcpu:
    """`cpu` is the logical processor it is associated with, `epoch` the TD epoch in which it entered the guest."""

    tdvpr: Pfn
    initialized: bool = False
    cpu: int | None = None
    epoch: int | None = None


class Td:
    """`children` counts the pages of 4K that PAMT has for this TD besides the TDR."""

    def __init__(self, tdr: Pfn, hkid: int) -> None:
        self.tdr = tdr
        self.hkid = hkid
        self.lifecycle = Lifecycle.HKID_ASSIGNED
        self.op_state = OpState.UNINITIALIZED
        self.params = DEFAULT_PARAMS
        self.configured_packages: set[int] = set()
        self.tdcx: list[Pfn] = []
        self.children = 0
        self.vcpus: dict[Pfn, TdVcpu] = {}
        self.epoch = 1
        self.epoch_users = [0, 0]  # vCPUs inside the guest, by the lowest bit of the epoch in which they entered
        self.sept = SecureEpt()
        self.measurement = hashlib.sha384()
        self.extended: dict[int, int] = {}  # frames that were added: how many of their chunks are in the measurement
        self.mrtd: bytes | None = None

    def __fingerprint__(self) -> object:
        return (
            self.tdr,
            self.hkid,
            self.lifecycle,
            self.op_state,
            self.children,
            sorted((v.tdvpr, v.initialized, v.cpu, v.epoch) for v in self.vcpus.values()),
            self.epoch,
            [sorted(level.items()) for level in self.sept.levels],
            self.measurement.hexdigest(),
            sorted(self.extended.items()),
        )
