"""What a client pays under `guestmem run` for calls that have nothing to do with KVM: the way through the shim."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.harness import ROUNDS, Row, report, show

_SOURCE = Path(__file__).with_suffix(".c")


def run() -> None:
    guestmem = Path(sys.executable).with_name("guestmem")
    with tempfile.TemporaryDirectory() as directory:
        client = str(Path(directory) / "untouched")
        subprocess.run(["gcc", "-O2", "-o", client, _SOURCE], check=True)
        pairs = [(measure([guestmem, "run", "--", client, "vm"]), measure([client])) for _ in range(ROUNDS)]
    rows = []
    for name in pairs[0][0]:
        ours = statistics.median(under[name] for under, _ in pairs)
        theirs = statistics.median(native[name] for _, native in pairs)
        ratio = statistics.median(under[name] / native[name] for under, native in pairs)
        rows.append(Row(name, show(ours, "op"), show(theirs, "op"), ratio))
    report("calls that are none of ours, in a process with a VM", "without the shim", rows)


def measure(command: Sequence[str | Path]) -> dict[str, float]:
    """Seconds of each call."""
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: float(nanoseconds) * 1e-9 for name, nanoseconds in (line.split("\t") for line in out.splitlines())}
