"""The two ways in which a client's calls come: seccomp with ptrace, as static clients have it, against the shim. The
same programs, linked statically and dynamically, in the same run."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.harness import ROUNDS, Row, report, show
from bench.untouched import measure

_PROGRAMS = {"serve": (), "untouched": ("vm",)}


def run() -> None:
    guestmem = Path(sys.executable).with_name("guestmem")
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for name, arguments in _PROGRAMS.items():
            dynamic, static = (_build(name, Path(directory), kind) for kind in ("-no-pie", "-static"))
            pairs = [
                tuple(measure([guestmem, "run", "--abi", "v7.4", "--", way, *arguments]) for way in (static, dynamic))
                for _ in range(ROUNDS)
            ]
            rows += [
                _row(call, [(traced[call], preloaded[call]) for traced, preloaded in pairs]) for call in pairs[0][0]
            ]
    report("calls of a static client, by seccomp notification and ptrace", "dynamic, by the shim", rows)


def _build(name: str, directory: Path, kind: str) -> Path:
    program = directory / f"{name}{kind}"
    subprocess.run(["gcc", "-O2", kind, "-o", program, Path(__file__).with_name(f"{name}.c")], check=True)
    return program


def _row(call: str, pairs: list[tuple[float, float]]) -> Row:
    ours, theirs = (statistics.median(times) for times in zip(*pairs, strict=True))
    return Row(call, show(ours, "op"), show(theirs, "op"), statistics.median(a / b for a, b in pairs))
