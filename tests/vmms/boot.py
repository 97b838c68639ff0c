"""Boot: how one VMM is started for one row, and what must be seen of it at its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tests.vmms.parts import Parts

BEGIN, END = "guest: begin", "guest: end 0"


@dataclass(frozen=True)
class Boot:
    """A command, and the check of what it printed: `verdict(console)` is "" or what is wrong.

    `console` is the file of the guest's serial console; None if the VMM puts it on its standard output.
    """

    command: Sequence[str]
    verdict: Callable[[str], str]
    console: Path | None = None


class Machine(Protocol):
    """A VMM with its configuration: a row of the table without its result. Values, and hashable."""

    @property
    def label(self) -> str:
        """What the row is called, in the table and on the command line."""
        ...

    def boot(self, parts: Parts, scratch: Path) -> Boot:
        """Fetch what it takes and say how it is started; `scratch` is an empty folder. Raises: CannotHaveError."""
        ...


def workload_verdict(expected: str, cpus: int) -> Callable[[str], str]:
    """The workload printed what it prints on the host, on so many CPUs, and the guest ended itself."""

    def verdict(console: str) -> str:
        lines = console.replace("\r", "").splitlines()
        if not any(line.startswith("guest: up") for line in lines):
            return f"user space not reached; last: {_last(lines)}"
        if f"guest: cpus {cpus}" not in lines:
            return f"not {cpus} CPUs: {_first(lines, 'guest: cpus')}"
        if BEGIN not in lines or END not in lines:
            return f"the workload did not end; last: {_last(lines)}"
        printed = lines[lines.index(BEGIN) + 1 : lines.index(END)]
        wanted = expected.splitlines()
        if printed != wanted:
            differs = next((pair for pair in zip(printed, wanted, strict=False) if pair[0] != pair[1]), ("", ""))
            return f"printed {differs[0]!r}, the host {differs[1]!r}"
        return ""

    return verdict


def _last(lines: Sequence[str]) -> str:
    return next((line.strip() for line in reversed(lines) if line.strip()), "nothing")


def _first(lines: Sequence[str], start: str) -> str:
    return next((line for line in lines if line.startswith(start)), "no such line")
