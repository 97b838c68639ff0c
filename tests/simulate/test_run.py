"""Rows in processes of their own."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from guestmem.memory import Conversion, Split
from guestmem.simulate.costs import default_costs
from guestmem.simulate.generators import Generated
from guestmem.simulate.row import combinations
from guestmem.simulate.run import RowLost, Task, run_rows
from guestmem.simulate.source import Source, survey
from guestmem.simulate.trace_file import TraceFile
from guestmem.trace import Refusal
from tests.simulate.conftest import Listed, replay

SOURCE = Generated("random", 1 << 30, 1, 3000)


def task(source: Source, order: int) -> Task:
    (combination,) = combinations([order], [Split.LAZY], [Conversion.ATOMIC])
    return Task(source, survey(SOURCE), combination, default_costs(), 5, None, True)


def test_rows_come_in_order_and_are_those_of_one_process() -> None:
    told: set[int] = set()
    rows = run_rows([task(SOURCE, 9), task(SOURCE, 0)], 2, lambda number, done: told.add(number))
    assert [row.label for row in rows] == ["2m lazy, atomic", "4k"]
    assert told == {0, 1}
    assert rows[0].samples == replay(SOURCE, 9, samples=5).samples
    assert rows[0].problems == []


def test_what_a_row_refuses_is_raised_here(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text("damage\n")
    with pytest.raises(Refusal, match=r"trace\.line"):
        run_rows([task(TraceFile(path), 9)], 1, lambda number, done: None)


@dataclass(frozen=True)
class Deadly(Listed):
    """Kills the process that reads it."""

    def events(self):  # type: ignore[no-untyped-def]
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_is_noticed() -> None:
    with pytest.raises(RowLost, match="2m lazy, atomic"):
        run_rows([task(Deadly(()), 9)], 1, lambda number, done: None)
