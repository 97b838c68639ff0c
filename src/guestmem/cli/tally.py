"""Tally: counts events by what a reader asks about, from the event stream alone."""

from __future__ import annotations

from collections import Counter

from rich.table import Table

from guestmem.trace import events as event


class Tally:
    """A listener. `counts` maps (heading, kind) to how often."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()

    def see(self, seen: event.Event) -> None:
        match seen:
            case event.KvmPageFault():
                self.counts["guest faults", f"{seen.access}, {seen.result}"] += 1
            case event.UserFault():
                self.counts["host faults", seen.result] += 1
            case event.GmemConvert():
                self.counts["conversions", f"to {seen.to}"] += 1
                self.counts["pages converted", f"to {seen.to}"] += seen.end - seen.start
            case event.GmemInvalidateBegin():
                self.counts["invalidations", f"{seen.user}: {seen.reason}"] += 1
            case event.KvmUnmap():
                self.counts["guest leaves zapped", seen.access] += seen.leaves
            case event.UserZap():
                self.counts["host entries zapped", "-"] += seen.entries
            case event.KvmExit():
                self.counts["exits", seen.reason.removesuffix("Exit")] += 1

    def table(self, held_bytes: int, seconds: float) -> Table:
        """The summary; `held_bytes` is what the guest's memory took at the end of its run."""
        table = Table("what", "kind", "count", title="what happened")
        heading = ""
        for (what, kind), count in sorted(self.counts.items()):
            table.add_row(what if what != heading else "", kind, f"{count:,}")
            heading = what
        table.add_section()
        table.add_row("memory held at the end", "", f"{held_bytes >> 10:,} KiB")
        table.add_row("time", "", f"{seconds:.2f} s")
        return table
