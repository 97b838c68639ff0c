"""The report of `guestmem run --explain`, on standard error."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table
from rich.text import Text

from guestmem.memory import PAGE_SIZE, InodeStatistics
from guestmem.serve.ioctl_names import ioctl_name
from guestmem.serve.report import Report
from guestmem.uapi.capability_names import capability_name

_SHOWN = 12
_ABSENCES = 3
_WIDTH = 120


def print_report(report: Report) -> None:
    console = Console(file=sys.stderr, highlight=False, width=None if sys.stderr.isatty() else _WIDTH)
    if report.calls:
        console.print(_calls(report))
    if report.refusals:
        console.print(Text("refused (guestmem explain RULE says more)", style="bold"))
        for kind, count in report.refusals.most_common():
            console.print(Text(f"  {count:>6} x {kind[0]} -> {report.examples[kind]}"))
    if report.unknown:
        console.print(Text("not served", style="bold"))
        for (on, request), count in report.unknown.most_common():
            console.print(Text(f"  {count:>6} x {ioctl_name(request)} on {on}"))
    if report.absent_capabilities:
        names = ", ".join(capability_name(number) for number in report.absent_capabilities)
        console.print(Text("capabilities that are not there", style="bold"))
        console.print(Text(f"  {names}"))
    if report.memory:
        console.print(_memory(report))
    if huge := [memory for memory in report.memory if memory.order]:
        console.print(_huge_pages(huge))
    for device in report.devices[:_SHOWN]:
        faults = "".join(f", {count} x {rule}" for rule, count in sorted(device.faults.items()))
        moved = f"{device.bytes_read} bytes read, {device.bytes_written} written{faults}"
        console.print(Text(f"DMA of device {device.number}: {moved}"))
    if report.left_open:
        left = ", ".join(f"{count} x {kind}" for kind, count in report.left_open.most_common())
        console.print(Text(f"never closed, but by the end of their process: {left}"))
    for note in report.notes:
        console.print(Text(note))
    for bug in report.bugs:
        console.print(Text(f"a bug of guestmem; the client got EIO\n{bug}", style="red"))


def print_absences(report: Report, program: str) -> None:
    """For a program that has failed: what it was told last, if that was shortly before its end."""
    absent = report.absences.at_the_end()[:_ABSENCES]
    if absent:
        print(f"guestmem run: {program} failed shortly after these answers:", file=sys.stderr)
        print(*(f"  {what}" for what in absent), sep="\n", file=sys.stderr)


def _calls(report: Report) -> Table:
    table = Table(title="calls", box=None, title_justify="left", title_style="bold", show_header=False)
    table.add_column(justify="right")
    table.add_column()
    for name, count in report.calls.most_common():
        table.add_row(str(count), name)
    return table


def _memory(report: Report) -> Table:
    """A line for each guest_memfd, the first dozen of them, as it was when it was closed."""
    table = Table(title="guest_memfd at their ends", box=None, title_justify="left", title_style="bold")
    for column in (
        "inode",
        "size",
        "allocated",
        "at most",
        "private",
        "conversions",
        "invalidations",
        "faults by user and access",
    ):
        table.add_column(column, justify="left" if column.startswith("faults") else "right")
    for memory in report.memory[:_SHOWN]:
        faults = ", ".join(f"{user} {access} {count}" for (user, access), count in sorted(memory.faults.items()))
        table.add_row(
            str(memory.number),
            _bytes(memory.size),
            _bytes(memory.allocated * PAGE_SIZE),
            _bytes(memory.allocated_peak * PAGE_SIZE),
            _bytes(memory.private * PAGE_SIZE),
            str(memory.conversions),
            str(sum(memory.invalidations.values())),
            faults,
        )
    if len(report.memory) > _SHOWN:
        table.add_row(f"{len(report.memory) - _SHOWN} more")
    return table


def _huge_pages(memories: list[InodeStatistics]) -> Table:
    """What is to be said of files of huge pages besides; the first dozen."""
    table = Table(title="of huge pages", box=None, title_justify="left", title_style="bold")
    for column in ("inode", "huge pages of", "host memory", "split", "merged"):
        table.add_column(column, justify="right")
    for memory in memories[:_SHOWN]:
        splits = ", ".join(f"{_bytes(PAGE_SIZE << order)} {count}" for order, count in sorted(memory.splits.items()))
        merges = ", ".join(f"{_bytes(PAGE_SIZE << order)} {count}" for order, count in sorted(memory.merges.items()))
        table.add_row(str(memory.number), _bytes(PAGE_SIZE << memory.order), memory.memory, splits, merges)
    if len(memories) > _SHOWN:
        table.add_row(f"{len(memories) - _SHOWN} more")
    return table


def _bytes(number: int) -> str:
    """4 KiB, 2 MiB: in the largest unit that divides it."""
    for shift, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if number and not number & ((1 << shift) - 1):
            return f"{number >> shift} {unit}"
    return f"{number} B"
