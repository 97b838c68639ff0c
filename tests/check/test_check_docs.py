"""The pages on checking are true: their scenarios and mutants run, their tables are whole."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from guestmem.check import mutants
from guestmem.check.explore import EXHAUSTED, VIOLATED, explore
from guestmem.check.invariants import OTHERS
from guestmem.check.scenario import built_in, in_module, load_file
from guestmem.check.strategies import STRATEGIES
from guestmem.check.strategies.states import States

DOCS = Path(__file__).parents[2] / "docs" / "check"
BLOCKS = [
    (page, block)
    for page in ("tutorial.md", "how-to.md")
    for block in re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
]


@pytest.mark.parametrize(("page", "block"), BLOCKS)
def test_what_a_page_shows_runs(page: str, block: str, tmp_path: Path) -> None:
    file = tmp_path / "shown.py"
    file.write_text(block)
    if "@mutant" in block:
        with mutants.find(str(file)).installed():
            assert explore(built_in()["punch_against_guest"], States()).verdict == VIOLATED
        return
    (scenario,) = in_module(load_file(file)).values()
    assert explore(scenario, States()).verdict == EXHAUSTED


def test_the_reference_has_every_strategy_and_liveness_property() -> None:
    text = (DOCS / "reference.md").read_text()
    table = text.split("## Strategies")[1].split("##")[0]
    assert set(re.findall(r"^\| (\w+) \|", table, re.MULTILINE)) - {"name"} == set(STRATEGIES)
    for name in OTHERS:
        assert re.search(rf"\b{name}\b", text), name


def test_the_limits_are_named() -> None:
    limits = (DOCS / "explanation.md").read_text().split("## What the explorer cannot see")[1]
    for word in ("await", "Memory ordering", "Bounds", "evaluation stack", "Partial-order", "hardware"):
        assert word in limits
