"""The cost model: nanoseconds for each thing that is counted, each with where the figure comes from.

`guestmem simulate --show-costs` prints it as TOML; an edited copy, or a part of it, is given back with `--costs FILE`.
The defaults are orders of magnitude: only those that say "measured" were.
"""

from __future__ import annotations

import errno
import tomllib
from pathlib import Path
from typing import NamedTuple

from guestmem.trace import Refusal

_MACHINE = "measured with the real KVM on the machine of README.md"


class Cost(NamedTuple):
    """`ns` for each `per`."""

    ns: float
    per: str
    source: str


DEFAULTS: dict[str, Cost] = {
    "request": Cost(8200, "conversion or hole", f"{_MACHINE}: KVM_RUN and an exit; the guest asks, the VMM calls"),
    "invalidation": Cost(500, "user told", "assumption: two calls, the locks of the user, its window"),
    "zap": Cost(40, "leaf removed", "assumption: an atomic exchange and the bookkeeping of the TDP MMU"),
    "flush": Cost(4000, "user told that had leaves", "assumption: IPI to all running vCPUs, and their exits"),
    "fault": Cost(
        2500,
        "leaf mapped at a first touch",
        f"assumption: exit, look-up, entry. {_MACHINE}: 3500 for a fault of userspace, zeroing included",
    ),
    "refault": Cost(
        2500,
        "leaf mapped again after a zap",
        "assumption: as fault. For a KVM that splits a leaf in place, what an entry of the new table takes: 20 or so",
    ),
    "zero": Cost(250, "4K page zeroed", "assumption: 16 GB/s"),
    "free": Cost(
        200,
        "folio that left the file",
        f"assumption. {_MACHINE}: 880 for allocation and hole of a 4K page",
    ),
    "split": Cost(15, "part made of a folio", "assumption: one struct page of 64 bytes, and its place in the file"),
    "merge": Cost(10, "part made into a folio", "assumption: as split, without initialising"),
    "vmemmap_restore": Cost(
        1000,
        "4K page of vmemmap given back",
        "assumption: allocate, copy 4 KiB, write an entry; vm.hugetlb_optimize_vmemmap is documented as 2x slower",
    ),
    "vmemmap_optimise": Cost(500, "4K page of vmemmap saved", "assumption: write an entry, free a page"),
    "rmp_assign": Cost(1000, "RMP entry assigned", "assumption for RMPUPDATE: no figure is published"),
    "rmp_reset": Cost(1000, "RMP entry given back to the host", "assumption for RMPUPDATE: no figure is published"),
    "psmash": Cost(2000, "2M RMP entry smashed into 512", "assumption: no figure is published"),
    "unsmash": Cost(
        20000,
        "512 RMP entries made one of 2M",
        "assumption: a firmware command (SNP_PAGE_UNSMASH), which Linux does not use yet",
    ),
}

FIRST_TOUCHES = ("fault", "zero", "rmp_assign")
"""Items that a guest pays once for its memory, whatever it converts."""

TLB_ENTRIES = Cost(2048, "entries", "assumption: a second-level TLB that holds leaves of any size")
"""Not a time: how many leaves a TLB holds. In the file it is [tlb] entries."""


class Costs(NamedTuple):
    """What a replay is charged by."""

    items: dict[str, Cost]
    tlb_entries: float

    def total(self, counts: dict[str, int]) -> dict[str, float]:
        """Nanoseconds by item; `counts` are of the same names."""
        return {name: counts[name] * self.items[name].ns for name in counts}

    def text(self) -> str:
        """As TOML."""
        lines = [
            "# guestmem simulate --costs FILE: ns for each thing counted. An item that is left out keeps its default."
        ]
        for name, cost in self.items.items():
            lines += ["", f"[{name}]", f"ns = {cost.ns:g}  # per {cost.per}", f'source = "{cost.source}"']
        lines += ["", "[tlb]", f"entries = {self.tlb_entries:g}", f'source = "{TLB_ENTRIES.source}"']
        return "\n".join(lines)


def default_costs() -> Costs:
    return Costs(dict(DEFAULTS), TLB_ENTRIES.ns)


def load(path: Path) -> Costs:
    """The defaults, with what the file says. Raises: Refusal EINVAL `costs.file`; OSError."""
    try:
        written = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Refusal(errno.EINVAL, "costs.file", why=str(error)) from None
    items = dict(DEFAULTS)
    entries = TLB_ENTRIES.ns
    for name, table in written.items():
        if not isinstance(table, dict) or (name not in items and name != "tlb"):
            raise Refusal(errno.EINVAL, "costs.file", why=f"no item {name}; there are {', '.join((*items, 'tlb'))}")
        key = "entries" if name == "tlb" else "ns"
        number = _number(name, table, key)
        if name == "tlb":
            entries = number
        else:
            items[name] = items[name]._replace(ns=number, source=str(table.get("source", "given")))
    return Costs(items, entries)


def _number(name: str, table: dict[str, object], key: str) -> float:
    unknown = set(table) - {key, "source"}
    number = table.get(key)
    if unknown or isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number < 1e12:
        raise Refusal(errno.EINVAL, "costs.file", why=f"[{name}] takes {key}, a number from 0 to 1e12, and source")
    return float(number)
