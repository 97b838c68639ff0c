"""The harness itself: what is judged a pass, what is killed, what the archive holds. No VMM is started here."""

from __future__ import annotations

import gzip
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.vmms import guest, run
from tests.vmms.boot import Boot, workload_verdict
from tests.vmms.cache import CannotHaveError, stamped
from tests.vmms.expected import EXPECTED_FAILURES, why_it_may_fail
from tests.vmms.parts import Parts
from tests.vmms.rows import QUICK, ROWS
from tests.vmms.run import Outcome, Result, attempt

EXPECTED = "integers 1\nchecksum 2\n"
CONSOLE = (
    "[ 0.1] Linux\r\nguest: up 1 s\r\nguest: cpus 2\r\nguest: begin\r\nintegers 1\r\nchecksum 2\r\nguest: end 0\r\n"
)


@dataclass(frozen=True)
class Script:
    """A shell script in the place of a VMM; its output is the console."""

    script: str
    label: str = "script"
    missing: str = ""

    def boot(self, parts: Parts, scratch: Path) -> Boot:
        if self.missing:
            raise CannotHaveError(self.missing)
        return Boot(["sh", "-c", self.script], workload_verdict(EXPECTED, 2))


def booted(tmp_path: Path, script: Script, timeout: float = 10) -> Outcome:
    return attempt(script, Parts(tmp_path), tmp_path / "logs", "", timeout)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("", "", ""),
        ("guest: up", "guest:", "user space not reached; last: guest: end 0"),
        ("cpus 2", "cpus 1", "not 2 CPUs: guest: cpus 1"),
        ("checksum 2", "checksum 3", "printed 'checksum 3', the host 'checksum 2'"),
        ("guest: end 0", "guest: end 1", "the workload did not end; last: guest: end 1"),
    ],
)
def test_what_passes_is_what_the_host_prints(old: str, new: str, said: str) -> None:
    assert workload_verdict(EXPECTED, 2)(CONSOLE.replace(old, new)) == said


def test_a_pass_needs_the_exit_code_too(tmp_path: Path) -> None:
    (tmp_path / "console").write_text(CONSOLE)
    assert booted(tmp_path, Script(f"cat {tmp_path}/console")).result is Result.PASSED
    failed = booted(tmp_path, Script(f"cat {tmp_path}/console; exit 3"))
    assert (failed.result, failed.why) == (Result.FAILED, "exit code 3")


def test_what_cannot_be_had_is_a_skip_with_its_reason(tmp_path: Path) -> None:
    assert booted(tmp_path, Script("", missing="no archive")) == Outcome(Result.SKIPPED, why="no archive")


def test_a_known_failure_says_why_and_a_pass_of_it_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "why_it_may_fail", lambda label: "not built")
    (tmp_path / "console").write_text(CONSOLE)
    failed, passed = (booted(tmp_path, Script(script)) for script in ("exit 3", f"cat {tmp_path}/console"))
    assert failed.result is Result.EXPECTED
    assert failed.why.endswith("exit code 3 (not built)")
    assert passed.result is Result.UNEXPECTED


def test_a_process_that_left_its_group_is_killed(tmp_path: Path) -> None:
    booted(tmp_path, Script(f"setsid sleep 600 & echo $! > {tmp_path}/pid"))
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and "sleep" in command_of(pid):
        time.sleep(0.01)
    assert "sleep" not in command_of(pid)


def command_of(pid: int) -> str:
    """The command line of a process; "" if it is gone, or a zombie."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def test_every_pattern_of_known_failures_fits_a_row() -> None:
    labels = [row.label for row in ROWS]
    for pattern, reason in EXPECTED_FAILURES:
        assert any(why_it_may_fail(label) == reason for label in labels), pattern


def test_labels_are_unique_and_the_quick_half_is_of_the_table() -> None:
    assert len({row.label for row in ROWS}) == len(ROWS)
    assert set(QUICK) <= set(ROWS)


def test_what_was_made_is_kept_until_the_key_changes_or_it_failed(tmp_path: Path) -> None:
    made: list[str] = []

    def make() -> dict[str, str]:
        made.append("x")
        if len(made) == 3:
            raise CannotHaveError("gone")
        return {"number": str(len(made))}

    folder = tmp_path / "folder"
    assert [stamped(folder, "a", make), stamped(folder, "a", make)] == [{"number": "1"}, {"number": "1"}]
    assert stamped(folder, "b", make) == {"number": "2"}
    with pytest.raises(CannotHaveError):
        stamped(folder, "c", make)
    assert stamped(folder, "b", make) == {"number": "4"}


def test_the_archive_is_one_that_cpio_reads(tmp_path: Path) -> None:
    """Read back by the archive's own rules, not by the writer's."""
    program = tmp_path / "program"
    program.write_bytes(b"\x7fELF odd")
    archive = gzip.decompress(
        guest.write_initramfs(tmp_path / "archive", tmp_path, program, program).read_bytes(),
    )
    names, at = [], 0
    while at < len(archive):
        assert archive[at : at + 6] == b"070701"
        numbers = [int(archive[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        size, name_size = numbers[6], numbers[11]
        names.append(archive[at + 110 : at + 109 + name_size].decode())
        at = -(-(-(-(at + 110 + name_size) // 4) * 4 + size) // 4) * 4
    assert names[-1] == "TRAILER!!!"
    assert {"init", "bin/busybox", "workload", "workload.sh", "dev/console"} <= set(names)


def test_the_workload_prints_the_same_twice(tmp_path: Path) -> None:
    """Nothing in it depends on time, addresses or process ids."""
    program = guest.build_workload(tmp_path)
    first, second = (subprocess.check_output([str(program)], text=True) for _ in range(2))
    assert first == second
    assert "failed" not in first
    assert first.splitlines()[-1].startswith("checksum ")


def test_the_command_line_lists_rows() -> None:
    listed = subprocess.check_output([sys.executable, "-m", "tests.vmms", "--list"], text=True)
    assert listed.splitlines() == [row.label for row in QUICK]
