"""What the calls of a KVM client cost under `guestmem run`, against this machine's /dev/kvm in the same run."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.harness import ROUNDS, Row, report, show
from bench.untouched import measure

_SOURCE = Path(__file__).with_suffix(".c")


def run() -> None:
    guestmem = Path(sys.executable).with_name("guestmem")
    real = os.access("/dev/kvm", os.R_OK | os.W_OK)
    with tempfile.TemporaryDirectory() as directory:
        client = str(Path(directory) / "serve")
        subprocess.run(["gcc", "-O2", "-o", client, _SOURCE], check=True)
        under: list[str | Path] = [guestmem, "run", "--abi", "future", "--", client]
        pairs = [(measure(under), measure([client]) if real else {}) for _ in range(ROUNDS)]
    rows = []
    for name in pairs[0][0]:
        ours = statistics.median(mine[name] for mine, _ in pairs)
        if not real:
            rows.append(Row(name, show(ours, "op"), "", None))
            continue
        theirs = statistics.median(native[name] for _, native in pairs)
        rows.append(
            Row(name, show(ours, "op"), show(theirs, "op"), statistics.median(a[name] / b[name] for a, b in pairs))
        )
    report("calls of a client with a mapped guest_memfd", "/dev/kvm of this machine", rows)
