"""The runner itself: whatever a program does, the machine is as before and the TAP line says what happened."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from tests.peer import run
from tests.peer.run import CannotRunError, Outcome, Program, attempt, execute, reserved_huge_pages


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pool of huge pages that is two files: one page in use, one free; a write changes the total only."""
    (tmp_path / "nr_hugepages").write_text("2\n")
    (tmp_path / "free_hugepages").write_text("1\n")
    (tmp_path / "meminfo").write_text("Hugepagesize:       2048 kB\n")
    monkeypatch.setattr(run, "HUGE_PAGES", tmp_path)
    monkeypatch.setattr(run, "MEMINFO", tmp_path / "meminfo")
    return tmp_path


def total(pool: Path) -> int:
    """How many pages the pool has."""
    return int((pool / "nr_hugepages").read_text())


def shell(script: str, timeout: float = 10.0) -> Outcome:
    """Execute a shell script as a program."""
    return execute(["sh", "-c", script], timeout)


@pytest.mark.parametrize(
    ("script", "problem"),
    [("exit 0", ""), ("exit 254", "exit code 254"), ("kill -SEGV $$", "killed by SIGSEGV")],
)
def test_an_end_is_described(script: str, problem: str) -> None:
    assert shell(script).problem == problem


def test_a_program_that_declines_says_why() -> None:
    outcome = shell("echo '1..0 # SKIP - Requirement not met: x & y'; exit 4")
    assert (outcome.declined, outcome.skip, outcome.problem) == (True, "Requirement not met: x & y", "")


def test_a_program_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    outcome = shell(f"sleep 600 & echo $! > {mark}; wait", timeout=0.5)
    assert outcome.problem == "no end within 0.5 s"
    assert is_gone(int(mark.read_text()))


def test_a_process_left_behind_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "GRACE", 0.1)
    mark = tmp_path / "pid"
    outcome = shell(f"sleep 600 & echo $! > {mark}")
    assert outcome.problem == "left processes behind after 0.1 s"
    assert is_gone(int(mark.read_text()))


def is_gone(pid: int) -> bool:
    """Whether a process that was killed is gone, or about to be: a zombie that its parent has yet to reap."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.01)
    return False


def test_output_and_command_of_a_program(tmp_path: Path) -> None:
    (tmp_path / "program").touch()
    command = f"{sys.executable} -c 'import sys; print(sys.argv[1:])' {{abi}} --"
    outcome = attempt(Program("program", "-s x", abi="v7.4"), tmp_path, command)
    assert outcome.output == f"{['v7.4', '--', str(tmp_path / 'program'), '-s', 'x']}\n"


def test_what_is_not_built_is_skipped(tmp_path: Path) -> None:
    assert attempt(Program("program"), tmp_path, "").skip == "not built (python -m tests.peer.build)"


def test_huge_pages_are_given_back_when_the_program_raises(pool: Path) -> None:
    (pool / "free_hugepages").write_text("2\n")
    with pytest.raises(KeyboardInterrupt), reserved_huge_pages(2):
        raise KeyboardInterrupt
    assert total(pool) == 2


def test_huge_pages_that_cannot_be_had_are_a_skip_and_given_back(pool: Path) -> None:
    with pytest.raises(CannotRunError, match="no 3 huge pages"), reserved_huge_pages(3):
        pytest.fail("ran without its huge pages")
    assert total(pool) == 2


def test_no_huge_pages_wanted_touches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "HUGE_PAGES", tmp_path / "absent")
    with reserved_huge_pages(0):
        assert not (tmp_path / "absent").exists()


def test_a_known_lack_is_a_skip_and_passing_is_a_problem() -> None:
    program = Program("any", lacks="no such thing")
    assert run.excuse(program, Outcome(problem="exit code 254")) == Outcome(skip="no such thing")
    assert run.excuse(program, Outcome(problem="declined: no SEV")).skip == "no such thing"
    for unexplained in ("no end within 60 s", "killed by SIGSEGV", "left processes behind after 2 s"):
        assert run.excuse(program, Outcome(problem=unexplained)).problem == unexplained
    assert "no such thing" in run.excuse(program, Outcome()).problem
    assert run.excuse(program, Outcome(skip="not built")).skip == "not built"
