"""The report of `guestmem run --explain`, on standard error."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table
from rich.text import Text

from guestmem.serve.ioctl_names import ioctl_name
from guestmem.serve.report import Report


def print_report(report: Report) -> None:
    console = Console(file=sys.stderr, highlight=False)
    if report.calls:
        console.print(_calls(report))
    if report.refusals:
        console.print(Text("refused (guestmem explain RULE says more)", style="bold"))
        for (call, rule), count in report.refusals.most_common():
            console.print(Text(f"  {count:>6} x {call} -> {report.examples[call, rule]}"))
    if report.unknown:
        console.print(Text("not served", style="bold"))
        for (on, request), count in report.unknown.most_common():
            console.print(Text(f"  {count:>6} x {ioctl_name(request)} on {on}"))
    for note in report.notes:
        console.print(Text(note))
    for bug in report.bugs:
        console.print(Text(f"a bug of guestmem; the client got EIO\n{bug}", style="red"))


def _calls(report: Report) -> Table:
    table = Table(title="calls", box=None, title_justify="left", title_style="bold", show_header=False)
    table.add_column(justify="right")
    table.add_column()
    for name, count in report.calls.most_common():
        table.add_row(str(count), name)
    return table
