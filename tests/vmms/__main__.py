"""`python -m tests.vmms [NAME...]`: boot real VMMs under `guestmem run`, and print the table.

By default the quick half; `--all` is the whole table, and a NAME chooses the rows whose label has it. `--command ''`
boots them on the machine's own /dev/kvm instead, `--tcg` by QEMU's own TCG, which shows that kernel, initramfs and
workload are right. Each row has its peer, the same boot by TCG in the same run, beside it.

Exit code: 1 if a row failed that is not known to (tests/vmms/expected.py).
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

from tests.vmms.boot import Machine
from tests.vmms.cache import cache_dir, locked
from tests.vmms.parts import Parts
from tests.vmms.qemu import Qemu
from tests.vmms.rows import QUICK, ROWS, Row
from tests.vmms.run import OURS, Outcome, Result, attempt, end_on_signal

PEER_TIMEOUT = 60.0
_LINE = "{result:<6}{label:<58}{seconds:>8}{peer:>8}{ratio:>7}  {why}"


def chosen(options: argparse.Namespace) -> list[Row]:
    """The rows that the command line asks for."""
    if options.names:
        return [row for row in ROWS if any(name in row.label for name in options.names)]
    return list(ROWS if options.all else QUICK)


class Table:
    """Runs rows and prints a line for each. A peer is booted once in a run."""

    def __init__(self, parts: Parts, options: argparse.Namespace) -> None:
        self.parts, self.options = parts, options
        self.results: Counter[Result] = Counter()
        self._peers: dict[Qemu, float | None] = {}

    def row(self, row: Row) -> None:
        """Its line, after its peer's boot."""
        peer = row.peer()
        seconds = self._peer_seconds(peer) if peer else None
        self._print(row, self._attempt(row, self.options.command, self.options.timeout), seconds)

    def peer(self, peer: Qemu) -> None:
        """A peer's own line."""
        self._print(peer, self._attempt(peer, "", PEER_TIMEOUT), None)

    def _peer_seconds(self, peer: Qemu) -> float | None:
        if peer not in self._peers:
            outcome = self._attempt(peer, "", PEER_TIMEOUT)
            passed = outcome.result is Result.PASSED
            self._peers[peer] = outcome.seconds if passed else None
        return self._peers[peer]

    def _attempt(self, machine: Machine, command: str, timeout: float) -> Outcome:
        return attempt(machine, self.parts, self.options.logs, command, timeout)

    def _print(self, row: Row, outcome: Outcome, peer: float | None) -> None:
        self.results[outcome.result] += 1
        ran = outcome.result is not Result.SKIPPED
        passed = outcome.result in (Result.PASSED, Result.UNEXPECTED)
        line = _LINE.format(
            result=outcome.result.value,
            label=row.label,
            seconds=f"{outcome.seconds:.1f}" if ran else "",
            peer=f"{peer:.1f}" if peer else "",
            ratio=f"{outcome.seconds / peer:.1f}" if peer and passed else "",
            why=outcome.why,
        )
        print(line.rstrip(), flush=True)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m tests.vmms", description="Boot real VMMs, print the table.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="the rows whose label contains one of these")
    parser.add_argument("--all", action="store_true", help="the whole table instead of the quick half")
    parser.add_argument("--tcg", action="store_true", help="by QEMU's own TCG, to see that what is booted is right")
    parser.add_argument("--command", default=OURS, help="what runs them, '' for nothing (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for each row (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=1, help="boot each row so many times")
    parser.add_argument("--cache", type=Path, default=cache_dir(), help="what was fetched (default: %(default)s)")
    parser.add_argument("--logs", type=Path, help="consoles and output (default: CACHE/logs)")
    parser.add_argument("--list", action="store_true", help="print the labels and do nothing")
    options = parser.parse_args()
    options.logs = options.logs or options.cache / "logs"
    rows = chosen(options)
    peers = list(dict.fromkeys(peer for row in rows if (peer := row.peer()))) if options.tcg else []
    if options.list:
        print(*(row.label for row in rows), sep="\n")
        return
    end_on_signal()
    parts = Parts(options.cache.resolve())
    table = Table(parts, options)
    print(_LINE.format(result="", label="", seconds="seconds", peer="TCG", ratio="ratio", why="").rstrip())
    with locked(options.cache):
        for peer in peers * options.repeat:
            table.peer(peer)
        for row in rows * options.repeat if not options.tcg else ():
            table.row(row)
    print(*(f"# {name} {version}" for name, version in sorted(parts.versions.items())), sep="\n")
    print(f"# consoles and output: {options.logs}")
    if table.results[Result.UNEXPECTED]:
        print(f"# {table.results[Result.UNEXPECTED]} passed that are known to fail: take them out of expected.py")
    passed = table.results[Result.PASSED] + table.results[Result.UNEXPECTED]
    expected, skipped = table.results[Result.EXPECTED], table.results[Result.SKIPPED]
    print(f"{passed} passed, {table.results[Result.FAILED]} failed, {expected + skipped} skipped")
    sys.exit(1 if table.results[Result.FAILED] else 0)


if __name__ == "__main__":
    main()
