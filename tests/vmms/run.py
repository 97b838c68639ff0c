"""One row: start the VMM, wait for its end, look at what its guest printed, and leave nothing behind."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
import tempfile
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from tests.peer.run import execute
from tests.vmms.boot import Boot, Machine
from tests.vmms.cache import CannotHaveError
from tests.vmms.expected import why_it_may_fail
from tests.vmms.parts import Parts

OURS = f"{Path(sys.executable).parent / 'guestmem'} run --explain --"


class Result(Enum):
    """As pytest calls them."""

    PASSED = "pass"
    FAILED = "FAIL"
    EXPECTED = "xfail"
    UNEXPECTED = "XPASS"
    SKIPPED = "skip"


@dataclass(frozen=True)
class Outcome:
    """How a row ended; `why` is the reason of what is no pass."""

    result: Result
    seconds: float = 0.0
    why: str = ""


def attempt(machine: Machine, parts: Parts, logs: Path, command: str, timeout: float) -> Outcome:
    """Boot `machine` under `command`; its console, its output and its command line are kept in a folder of `logs`."""
    folder = logs / machine.label.replace(" ", "_").replace("/", "_")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    # Short: the address of a Unix socket has 108 bytes. What a killed program leaves in it goes with it.
    with tempfile.TemporaryDirectory(prefix="vmms-") as scratch:
        try:
            boot = machine.boot(parts, Path(scratch))
        except CannotHaveError as error:
            return Outcome(Result.SKIPPED, why=str(error))
        line = ["env", f"TMPDIR={scratch}", *shlex.split(command), *boot.command]
        (folder / "command").write_text(f"{shlex.join(line)}\n")
        try:
            seconds, problem = _execute(boot, line, folder, timeout)
        finally:
            end_all_with(f"TMPDIR={scratch}")
    return _judge(machine.label, seconds, problem)


def _execute(boot: Boot, line: list[str], folder: Path, timeout: float) -> tuple[float, str]:
    """Seconds, and "" or what was wrong: the guest's own words before those of the VMM."""
    ended = execute(line, timeout)
    (folder / "output").write_text(ended.output)
    console = ended.output
    if boot.console is not None:
        console = boot.console.read_text(errors="replace") if boot.console.exists() else ""
        (folder / "console").write_text(console)
    problem = ended.problem
    if not console and boot.console is not None:
        return ended.seconds, problem or "the guest printed nothing"
    said = boot.verdict(console)
    return ended.seconds, "; ".join(filter(None, (said, problem)))


def end_all_with(variable: str) -> list[int]:
    """Kill every process that has this in its environment, as what a row starts has, whatever its group; their ids."""
    ended = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            if variable.encode() in environment.read_bytes().split(b"\0"):
                ended.append(int(environment.parent.name))
                os.kill(ended[-1], signal.SIGKILL)
        except OSError:
            continue  # gone, or not ours
    return ended


def _judge(label: str, seconds: float, problem: str) -> Outcome:
    reason = why_it_may_fail(label)
    if problem:
        return Outcome(
            Result.EXPECTED if reason else Result.FAILED, seconds, f"{problem} ({reason})" if reason else problem
        )
    return Outcome(Result.UNEXPECTED if reason else Result.PASSED, seconds, reason)


def end_on_signal() -> None:
    """Let a signal that ends us pass through every `finally`, at which what was started is killed."""

    def end(number: int, _frame: object) -> None:
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)
