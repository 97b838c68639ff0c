"""Builds the probe with gcc, runs it natively or under `guestmem run`, and compares the rows."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.golden.rows import PECULIAR, ROWS, SLOW_GROUP, SLOW_ROWS, UNIMITABLE

PROBE_SOURCES = Path(__file__).parent / "probe"
ABI = "v6.18"
WARNINGS = ["-Wall", "-Wextra", "-Werror"]
# For all that the probe asks. It gives a group 20 s before it ends it, the slow one 120 s.
SECONDS = 200
MOST_REMARKS = 40

# What is started may have a bug that fills the memory; all of it is then killed before anything else on the machine.
# A shell does it, because Python between fork and exec in a threaded process may hang.
BE_THE_VICTIM = ["/bin/sh", "-c", 'echo 1000 >/proc/self/oom_score_adj 2>/dev/null; exec "$@"', "sh"]


@dataclasses.dataclass(frozen=True, slots=True)
class Answers:
    """`rows`: what the probe printed. `remarks`: what it said about groups that broke off, and the standard error."""

    rows: dict[str, str]
    remarks: list[str]


@dataclasses.dataclass(frozen=True, slots=True)
class Difference:
    """A row that is not as the table has it. `excuse` says why that is accepted; "" if it is not."""

    id: str
    expected: str
    got: str
    excuse: str


def build(directory: Path) -> Path:
    """The probe, dynamically linked, in `directory`."""
    program = directory / "probe"
    sources = sorted(str(source) for source in PROBE_SOURCES.glob("*.c"))
    command = ["gcc", "-std=gnu11", "-O1", "-g", *WARNINGS, "-o", str(program), *sources]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"gcc failed:\n{done.stderr}")
    return program


def guestmem_command() -> list[str]:
    """`guestmem run` of this environment, up to the client's command line."""
    script = Path(sys.executable).parent / "guestmem"
    found = str(script) if script.exists() else shutil.which("guestmem")
    return [found or "guestmem", "run", "--abi", ABI, "--"]


def guestmem_missing() -> str:
    """Why `guestmem run` cannot be asked; "" if it can, or if it is there and broken."""
    program = guestmem_command()[0]
    try:
        done = subprocess.run([program, "run", "--help"], capture_output=True, text=True, timeout=60, check=False)
    except OSError as error:
        return f"{program}: {error.strerror}"
    return "guestmem has no sub-command run" if "No such command" in done.stderr else ""


def selection(sections: Iterable[str], *, slow: bool) -> list[str]:
    """The probe's arguments."""
    return [*sections, *([] if slow else [f"-{SLOW_GROUP}"])]


def asked(sections: Iterable[str], *, slow: bool) -> list[str]:
    """The rows that `selection` asks; no section means all."""
    wanted = set(sections)
    return [
        row.id for row in ROWS.values() if (not wanted or row.section in wanted) and (slow or row.id not in SLOW_ROWS)
    ]


def run(program: Path, arguments: Sequence[str], prefix: Sequence[str] = ()) -> Answers:
    """Run it in a session of its own, which is ended as a whole: nothing that it started outlives this call."""
    command = [*BE_THE_VICTIM, *prefix, str(program), *arguments]
    environment = {**os.environ, "TMPDIR": str(program.parent)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        try:
            out, err = process.communicate(timeout=SECONDS)
            late = []
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            late = [f"ended after {SECONDS} s"]
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    status = [] if process.returncode == 0 else [f"exit status {process.returncode}"]
    return _parse(out, [*late, *status, *err.splitlines()])


def _parse(output: str, remarks: list[str]) -> Answers:
    """A line with a tab is a row; the last answer counts, and a row answered twice is remarked."""
    rows: dict[str, str] = {}
    for line in output.splitlines():
        row_id, tab, result = line.partition("\t")
        if not tab:
            remarks.append(line)
        elif row_id in rows:
            remarks.append(f"answered twice: {line}")
        else:
            rows[row_id] = result.rstrip()
    return Answers(rows, remarks)


def excuse(row_id: str) -> str:
    if row_id in PECULIAR:
        return f"peculiar: {PECULIAR[row_id]}"
    return f"unimitable: {UNIMITABLE[row_id]}" if row_id in UNIMITABLE else ""


def differences(answers: Answers, row_ids: Iterable[str], *, excuses: bool = True) -> list[Difference]:
    """The rows that differ, those that were not answered included."""
    found = []
    for row_id in row_ids:
        got = answers.rows.get(row_id, "(no answer)")
        if got != ROWS[row_id].result:
            found.append(Difference(row_id, ROWS[row_id].result, got, excuse(row_id) if excuses else ""))
    return found


def stale(answers: Answers, row_ids: Iterable[str]) -> list[str]:
    """Rows that are listed as unimitable and agree."""
    return [row_id for row_id in row_ids if row_id in UNIMITABLE and answers.rows.get(row_id) == ROWS[row_id].result]


def report(found: Sequence[Difference], answers: Answers, row_ids: Sequence[str]) -> str:
    """The difference, row by row, with the question; then what the run said besides."""
    lines = []
    for difference in found:
        row = ROWS[difference.id]
        lines.append(f"{row.id:5} {row.call}: {row.arguments}")
        lines.append(f"      expected {difference.expected}")
        lines.append(f"      got      {difference.got}")
        if difference.excuse:
            lines.append(f"      accepted {difference.excuse}")
    lines += [f"remark: {remark}" for remark in answers.remarks[:MOST_REMARKS]]
    if len(answers.remarks) > MOST_REMARKS:
        lines.append(f"and {len(answers.remarks) - MOST_REMARKS} remarks more")
    accepted = sum(1 for difference in found if difference.excuse)
    agree = len(row_ids) - len(found)
    lines.append(f"{agree} of {len(row_ids)} rows agree, {len(found) - accepted} differ, {accepted} differ as accepted")
    return "\n".join(lines)
