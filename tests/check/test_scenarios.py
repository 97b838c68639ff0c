"""Every scenario that comes with guestmem, to its end: the product keeps every property in every schedule."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

import guestmem.check.scenarios
from guestmem.check.explore import EXHAUSTED, explore
from guestmem.check.scenario import built_in, find, load_file
from guestmem.check.strategies.states import States

SCENARIOS = built_in()
FOLDER = Path(inspect.getfile(guestmem.check.scenarios)).parent


@pytest.mark.parametrize("name", SCENARIOS)
def test_exhausted(name: str) -> None:
    scenario = SCENARIOS[name]
    result = explore(scenario, States(scenario.preemptions))
    assert (result.verdict, result.property, result.facts) == (EXHAUSTED, "", "")
    assert result.executions > 1, "one schedule is no race"


def test_there_are_many_and_each_says_what_it_is_about() -> None:
    assert len(SCENARIOS) >= 25
    for name, scenario in SCENARIOS.items():
        assert scenario.summary.endswith("."), name
        assert scenario.sometimes, f"{name} could be vacuous"


def test_a_file_each_by_name_and_short() -> None:
    files = {path.stem: path for path in FOLDER.rglob("[a-z]*.py")}
    assert set(files) == set(SCENARIOS)
    for path in files.values():
        assert len(path.read_text().splitlines()) <= 45, f"{path.name} is not short"


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from guestmem.check.scenario import scenario\n"
        "@scenario(sometimes={'host: ok'})\n"
        "def mine(m):\n"
        "    m.actor('host', m.write(m.gmem().mmap(), b'h'))\n"
    )
    (mine,) = find(str(path))
    assert explore(mine, States()).verdict == EXHAUSTED
    assert load_file(path).mine.name == "mine"
    with pytest.raises(LookupError):
        find("nosuch")
