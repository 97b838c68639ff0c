"""`guestmem simulate`: options, formats, files, exit codes."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner, Result

from guestmem.cli.main import app
from guestmem.cli.simulate import Kind
from guestmem.simulate.generators import GENERATORS

SMALL = ("--generate", "random", "--memory", "2G", "--count", "60")


def simulate(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["simulate", *arguments])


def rows(*arguments: str) -> list[dict[str, Any]]:
    done = simulate(*arguments, "--format", "json")
    assert done.exit_code == 0, done.output
    found: list[dict[str, Any]] = json.loads(done.output)["rows"]
    for row in found:
        del row["measured"]  # times
    return found


def test_the_kinds_are_the_generators() -> None:
    assert set(Kind) == set(GENERATORS)


def test_a_table_has_a_line_for_each_row() -> None:
    done = simulate(*SMALL, "--policy", "lazy,whole,atomic,stepwise", "--verify", "--jobs", "2")
    assert done.exit_code == 0, done.output
    for heading in ("folios", "KVM's mappings", "cost by the model", "measured"):
        assert heading in done.output
    labels = ["4k     -", *(f"{size}     {split}, {step}" for size in ("2m", "1g") for split in ("lazy", "whole")
              for step in ("atomic", "stepwise"))]  # fmt: skip
    for label in labels:
        assert len(re.findall(f"^{label} ", done.output, re.MULTILINE)) == 4, label
    assert done.output.count("ends as it began: every huge page is merged, every count is at its start") == 9


def test_a_written_trace_is_replayed_as_it_was_made(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    done = simulate(*SMALL, "--output", str(path))
    assert done.output == f"written: {path}, 123 events\n"
    assert len(path.read_text().splitlines()) == 123
    some = ("--page-size", "1g", "--policy", "lazy")
    assert rows(str(path), *some) == rows(*SMALL, *some)


def test_json_has_what_is_documented() -> None:
    done = simulate(*SMALL, "--page-size", "1g", "--policy", "whole", "--samples", "4", "--format", "json")
    answer = json.loads(done.output)
    assert set(answer) == {"trace", "events", "tlb_entries", "costs_ns", "rows"}
    (row,) = answer["rows"]
    assert (row["page_size"], row["policy"], len(row["samples"]), row["problems"]) == ("1g", "whole, atomic", 4, None)
    assert row["cost_ns_total"] == pytest.approx(sum(row["cost_ns"].values()))
    assert row["cost_ns"] == {name: row["counts"][name] * ns for name, ns in answer["costs_ns"].items()}
    assert row["measured"]["conversions"] == row["conversions"] == 60


def test_the_cost_model_can_be_edited(tmp_path: Path) -> None:
    shown = simulate("--show-costs")
    assert shown.exit_code == 0
    costs = tmp_path / "costs.toml"
    costs.write_text(re.sub("^ns = .*$", "ns = 0", shown.output, flags=re.MULTILINE))
    (row,) = rows(*SMALL, "--page-size", "2m", "--policy", "lazy", "--costs", str(costs))
    assert row["cost_ns_total"] == 0


def test_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra plot is not installed")
    one = (*SMALL, "--page-size", "4k")
    png, svg = tmp_path / "a.png", tmp_path / "a.svg"
    assert simulate(*one, "--plot", str(png)).exit_code == 0
    assert simulate(*one, "--plot", str(svg)).exit_code == 0
    assert png.read_bytes().startswith(b"\x89PNG\r\n")
    assert ElementTree.parse(svg).getroot().tag.endswith("svg")


def test_without_matplotlib_the_extra_is_named_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = simulate(*SMALL, "--plot", str(tmp_path / "a.png"))
    assert done.exit_code == 2
    assert done.stderr == "guestmem simulate: plots need matplotlib: pip install 'guestmem[plot]'\n"
    assert done.stdout == ""


def test_damage_is_reported_and_nothing_is_printed(tmp_path: Path) -> None:
    path, picture = tmp_path / "trace.json", tmp_path / "a.svg"
    simulate(*SMALL, "--output", str(path))
    lines = path.read_text().splitlines()
    lines[99] = lines[99][:20]
    path.write_text("\n".join(lines) + "\n")
    done = simulate(str(path), "--plot", str(picture))
    assert done.exit_code == 2
    assert done.stderr.startswith("guestmem simulate: EINVAL [trace.line] line 100, why ")
    assert done.stdout == ""
    assert not picture.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "give a trace, or --generate"),
        (("/dev/null", *SMALL), "give a trace, or --generate"),
        (("/no/such.json",), "is no file"),
        (("/dev/null",), "is no file"),
        ((*SMALL, "--page-size", "4k,3m"), "no '3m'; there are 4k, 2m, 1g"),
        ((*SMALL, "--page-size", ""), "no ''"),
        ((*SMALL, "--policy", "lazy,eager"), "no 'eager'; there are lazy, whole, atomic, stepwise"),
        ((*SMALL[:2], "--memory", "lots"), "'lots' is no size"),
        ((*SMALL[:2], "--memory", "1M"), "generate.memory"),
        ((*SMALL, "--spare", "-1"), "'-1' is no size"),
        ((*SMALL, "--plot", "a.gif"), "a plot is .png or .svg"),
        ((*SMALL, "--plot", "/no/such/a.png"), "no such folder"),
        ((*SMALL, "--costs", "/no/such.toml"), "/no/such.toml: No such file"),
        ((*SMALL, "--output", "/no/such/trace.json"), "/no/such/trace.json: No such file"),
        (("README.md", "--output", "x.json"), "--output is for a trace that is made"),
    ],
)
def test_bad_input_is_exit_2(arguments: tuple[str, ...], says: str) -> None:
    done = simulate(*arguments)
    assert done.exit_code == 2
    assert says in re.sub(r"[\s│]+", " ", done.stderr)
    assert done.stdout == ""


def test_an_end_that_is_not_the_start_is_exit_1(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    simulate(*SMALL, "--output", str(path))
    path.write_text("\n".join(path.read_text().splitlines()[:5]) + "\n")
    done = simulate(str(path), "--page-size", "1g", "--policy", "lazy", "--verify")
    assert done.exit_code == 1
    assert "pages do not have the access that they were born with" in done.output
