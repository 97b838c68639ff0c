"""Timing a subject against a peer, in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

ROUNDS = 5
ROUND_SECONDS = 0.1

Work = Callable[[int], None]
"""Does a thing `count` times."""


class Row(NamedTuple):
    """A line of a report. `ratio` is subject over peer in time: 2.0 is twice as slow; None without a peer."""

    name: str
    subject: str
    peer: str
    ratio: float | None


def seconds_each(work: Work, seconds: float = ROUND_SECONDS) -> float:
    """Time of one turn of `work`, from as many as fill about `seconds`."""
    count = 1
    while True:
        began = time.perf_counter()
        work(count)
        taken = time.perf_counter() - began
        if taken >= seconds or count >= 1 << 24:
            return taken / count
        count = max(count * 2, int(count * seconds / max(taken, 1e-9)))


def compare(name: str, subject: Work, peer: Work | None = None, unit: str = "op") -> Row:
    """Subject and peer in turns; medians of both, and of the ratios pair by pair."""
    times, peer_times = [], []
    for _ in range(ROUNDS):
        times.append(seconds_each(subject))
        if peer is not None:
            peer_times.append(seconds_each(peer))
    if peer is None:
        return Row(name, show(statistics.median(times), unit), "", None)
    ratio = statistics.median(ours / theirs for ours, theirs in zip(times, peer_times, strict=True))
    return Row(name, show(statistics.median(times), unit), show(statistics.median(peer_times), unit), ratio)


def show(seconds: float, unit: str) -> str:
    """Time of one and how many in a second."""
    rate = 1 / seconds
    shown = f"{rate / 1e6:.2f} M" if rate >= 1e6 else f"{rate / 1e3:.1f} k" if rate >= 1e3 else f"{rate:.1f} "
    each = f"{seconds * 1e9:.2f} ns" if seconds < 1e-7 else f"{seconds * 1e6:,.2f} us"
    return f"{each} ({shown}{unit}/s)"


def report(title: str, peer: str, rows: list[Row]) -> None:
    """Print rows under a title; `peer` says what they are compared with."""
    table = Table("what", "guestmem", peer, "time ratio", title=title, title_justify="left")
    for row in rows:
        table.add_row(row.name, row.subject, row.peer, "" if row.ratio is None else f"{row.ratio:.2f}")
    Console(width=120).print(table)
