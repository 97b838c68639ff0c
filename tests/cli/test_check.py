"""`guestmem check`: verdicts, formats, exit codes, replay."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner, Result

from guestmem.check.strategies import STRATEGIES
from guestmem.cli.check import StrategyName
from guestmem.cli.main import app

BUGS = Path(__file__).parents[1] / "known_bugs"
B24 = str(BUGS / "b24_references_before_unmap.py")


def check(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["check", *arguments])


def test_a_pass_is_exit_0_and_says_exhausted() -> None:
    done = check("two_binds_of_one_page", "mmap_against_last_close")
    assert done.exit_code == 0
    assert "exhausted two_binds_of_one_page" in done.output
    assert "2 scenarios: 2 exhausted, 0 stopped at a limit, 0 violated" in done.output


def test_json_is_as_documented() -> None:
    done = check("two_binds_of_one_page", "--format", "json")
    report = json.loads(done.output)
    assert set(report) == {"scenarios", "mutants"}
    (scenario,) = report["scenarios"]
    assert set(scenario) == {
        "name", "verdict", "bound", "executions", "states", "seconds", "property", "schedule",
    }  # fmt: skip
    assert (scenario["verdict"], scenario["bound"], scenario["property"]) == ("exhausted", "every schedule", None)
    limited = json.loads(check("two_conversions", "--executions", "2", "--format", "json").output)["scenarios"][0]
    assert (limited["verdict"], limited["executions"]) == ("limit", 2)


def test_failures_in_place_of_the_scenarios_own() -> None:
    """A scenario that needs one to refuse anything has nothing to refuse with none."""
    none = check("convert_without_memory", "--failures", "0")
    assert "never in any schedule: convert: convert.nomem" in none.output, none.output
    assert check("convert_against_pin", "--failures", "1").exit_code == 0


def test_a_violation_is_exit_1_with_a_story_and_a_command_that_replays_it() -> None:
    done = check("convert_against_pin", "--mutant", B24)
    assert done.exit_code == 1
    assert "S1 a private page is invisible to the host" in done.output
    command = next(line for line in done.output.splitlines() if line.startswith("again: guestmem check "))
    assert f"convert_against_pin --schedule 'b3a3b' --mutant {B24}" in command
    again = check("convert_against_pin", "--schedule", "b3a3b", "--mutant", B24, "--format", "json")
    assert again.exit_code == 1
    (scenario,) = json.loads(again.output)["scenarios"]
    assert (scenario["property"], scenario["schedule"]) == ("S1", "b3a3b")
    assert check("convert_against_pin", "--schedule", "b3a3b").exit_code == 0


def test_mutants_in_json(tmp_path: Path) -> None:
    for name in ("b11_readonly_gmem_slot", "b24_references_before_unmap"):
        (tmp_path / f"{name}.py").write_text((BUGS / f"{name}.py").read_text())
    hunted = ["readonly_gmem_slot", "convert_against_pin"]
    done = check(*hunted, "--mutants", "--mutants-in", str(tmp_path), "--format", "json")
    assert done.exit_code == 0
    report = json.loads(done.output)
    assert report["scenarios"] == []
    assert [(each["name"], each["found"], each["scenario"]) for each in report["mutants"]] == [
        ("readonly_gmem_slot", True, "readonly_gmem_slot"),
        ("references_before_unmap", True, "convert_against_pin"),
    ]
    assert set(report["mutants"][0]) == {
        "name", "found", "property", "scenario", "executions", "seconds", "schedule",
    }  # fmt: skip
    missed = check("two_conversions", "--mutants", "--mutants-in", str(tmp_path))
    assert missed.exit_code == 1
    assert "NOT FOUND B11" in missed.output


def test_tap() -> None:
    lines = check("two_binds_of_one_page", "--format", "tap").output.splitlines()
    assert lines == ["TAP version 14", "1..1", "ok 1 - two_binds_of_one_page (every schedule)"]
    lines = check("convert_against_pin", "--mutant", B24, "--format", "tap").output.splitlines()
    assert lines[2] == "not ok 1 - convert_against_pin (every schedule)"
    assert "  property: S1" in lines
    limited = check("two_conversions", "--strategy", "random", "--executions", "3", "--format", "tap").output
    assert "ok 1 - two_conversions (every schedule) # TODO not exhausted: 3 executions" in limited


def test_nothing_run_is_exit_4() -> None:
    for arguments in (
        ["nosuch"],
        ["nosuch.py"],
        ["--mutants", "--mutants-in", "nosuch"],
        ["two_conversions", "--mutant", "nosuch.py"],
        ["two_conversions", "--schedule", "?"],
        ["--schedule", "a"],
    ):
        assert check(*arguments).exit_code == 4, arguments


def test_the_trace_files_are_written(tmp_path: Path) -> None:
    target = tmp_path / "witness.json"
    check("convert_against_pin", "--schedule", "b3a3b", "--mutant", B24, "--trace", str(target), "--confirm")
    assert json.loads(target.read_text())["traceEvents"]
    assert json.loads((tmp_path / "witness.steps.json").read_text())["property"] == "S1"


def test_the_list_and_the_strategies() -> None:
    assert "convert_against_pin" in check("--list").output
    assert {name.value for name in StrategyName} == set(STRATEGIES)
