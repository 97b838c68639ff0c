"""The pages on simulating name what there is: options, fields, kinds."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from guestmem.cli.main import app
from guestmem.simulate.generators import GENERATORS
from guestmem.simulate.row import Row, Sample

ROOT = Path(__file__).parents[2]
HOW_TO = (ROOT / "docs/simulate/how-to.md").read_text()
EXPLANATION = (ROOT / "docs/simulate/explanation.md").read_text()
COMMANDS = re.findall(r"^guestmem simulate (--generate .*)$", HOW_TO, re.MULTILINE)


def fields_of(what: str) -> set[str]:
    table = HOW_TO.split(f"| field of a {what} |")[1].split("\n\n")[0]
    return {name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])}


def test_the_fields_are_those_of_the_answer() -> None:
    assert fields_of("row") == set(Row.__struct_fields__)
    assert fields_of("sample") == set(Sample.__struct_fields__)


def test_the_options_are_those_of_the_command() -> None:
    help_text = re.sub(
        r"\x1b\[[0-9;]*m", "", CliRunner().invoke(app, ["simulate", "--help"], terminal_width=200).output
    )
    options = set(re.findall(r"(--[a-z-]+)", help_text)) - {"--help", "--trace"}
    assert {"--page-size", "--policy", "--generate", "--spare", "--verify", "--jobs"} <= options
    assert options <= set(re.findall(r"--[a-z-]+", HOW_TO))


def test_every_kind_is_explained() -> None:
    for kind in GENERATORS:
        assert re.search(rf"^\| `{kind}` \|", EXPLANATION, re.MULTILINE)
        assert f"--generate {kind}" in HOW_TO


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_shown_can_be_generated(command: str, tmp_path: Path) -> None:
    arguments = [word for word in shlex.split(command) if not word.endswith(".json") and word != "--output"]
    small = ["--memory", "1G", "--count", "10", "--output", str(tmp_path / "trace.json")]
    done = CliRunner().invoke(app, ["simulate", *arguments, *small])
    assert done.exit_code == 0, done.output
