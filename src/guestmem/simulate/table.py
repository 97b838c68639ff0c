"""The answer as tables: what happened to folios and mappings, what it would have cost, what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from rich.table import Table

from guestmem.simulate.costs import FIRST_TOUCHES
from guestmem.simulate.row import Result, Row
from guestmem.simulate.sizes import size_text


class Column(NamedTuple):
    heading: str
    show: Callable[[Row], str]


def _by_size(counts: dict[str, int]) -> str:
    return " + ".join(f"{count:,} x {name}" for name, count in counts.items() if count) or "0"


def _end(row: Row, name: str) -> str:
    """The share of memory that is in folios of a size at the end."""
    folios = row.samples[-1].folio_bytes
    total = sum(folios.values())
    return f"{100 * folios[name] / total:.4g} %" if total else "-"


FOLIOS = (
    Column("splits", lambda row: _by_size(row.splits)),
    Column("merges", lambda row: _by_size(row.merges)),
    Column("split at most", lambda row: f"{row.lost_most:,}"),
    Column("1g, 2m, 4k at the end", lambda row: ", ".join(_end(row, name) for name in ("1g", "2m", "4k"))),
    Column("HVO saves", lambda row: size_text(row.vmemmap_saved_at_start)),
    Column("given back at most", lambda row: size_text(row.vmemmap_given_back_most)),
)

MAPPINGS = (
    Column("users told", lambda row: f"{row.counts['invalidation']:,}"),
    Column("leaves zapped", lambda row: f"{row.counts['zap']:,}"),
    Column("refaults", lambda row: f"{row.counts['refault']:,}"),
    Column("leaves at most", lambda row: f"{row.leaves_most:,}"),
    Column("their tables", lambda row: size_text(row.table_bytes_most)),
    Column("RMP entries at most", lambda row: f"{row.rmp_most:,}"),
    Column("TLB reach at least", lambda row: size_text(row.tlb_reach_least)),
)

_SHARES = {
    "calls": ("request",),
    "zap, flush": ("invalidation", "zap", "flush"),
    "refaults": ("refault",),
    "split, merge": ("split", "merge"),
    "vmemmap": ("vmemmap_restore", "vmemmap_optimise"),
    "RMP": ("rmp_reset", "psmash", "unsmash"),
    "free": ("free",),
    "first touches": FIRST_TOUCHES,
}


def _share(items: Iterable[str]) -> Callable[[Row], str]:
    return lambda row: seconds_text(sum(row.cost_ns.get(item, 0) for item in items))


COSTS = (
    *(Column(name, _share(items)) for name, items in _SHARES.items()),
    Column("sum", lambda row: seconds_text(row.cost_ns_total)),
    Column("a request", lambda row: seconds_text(row.cost_ns_per_request)),
)

MEASURED = (
    Column("conversions", lambda row: f"{row.conversions:,}"),
    Column("holes", lambda row: f"{row.holes:,}"),
    Column("refused", lambda row: ", ".join(f"{count:,} x {rule}" for rule, count in row.refused.items()) or "0"),
    Column("provider, us a conversion", lambda row: f"{row.measured.conversion_us_mean:.1f}"),
    Column("of it CPU", lambda row: f"{row.measured.conversion_cpu_us_mean:.1f}"),
    Column("slowest", lambda row: f"{row.measured.conversion_us_most:,.0f}"),
    Column("state", lambda row: size_text(row.measured.state_bytes)),
    Column("replay", lambda row: f"{row.measured.seconds:.1f} s"),
)


def seconds_text(nanoseconds: float) -> str:
    """Three digits and a unit."""
    for unit, size in (("s", 1e9), ("ms", 1e6), ("us", 1e3)):
        if nanoseconds >= size:
            return (
                f"{nanoseconds / size:.3g} {unit}" if nanoseconds < 1000 * size else f"{nanoseconds / size:,.0f} {unit}"
            )
    return f"{nanoseconds:.0f} ns"


def tables(result: Result) -> list[Table]:
    """Four, with a line for each row."""
    return [
        _table("folios", FOLIOS, result.rows),
        _table(f"KVM's mappings (TLB of {result.tlb_entries:g} entries)", MAPPINGS, result.rows),
        _table("cost by the model (--show-costs); a request is a conversion or a hole", COSTS, result.rows),
        _table("measured: this replay", MEASURED, result.rows),
    ]


def _table(title: str, columns: tuple[Column, ...], rows: list[Row]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("pages")
    table.add_column("policy")
    for column in columns:
        table.add_column(column.heading, justify="right")
    for row in rows:
        table.add_row(row.page_size, row.policy, *(column.show(row) for column in columns))
    return table
