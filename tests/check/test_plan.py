"""Work in other processes: the same states and verdicts as in one, whatever dies meanwhile."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from guestmem.check import work
from guestmem.check.explore import EXHAUSTED, VIOLATED, Result, explore
from guestmem.check.plan import Plan
from guestmem.check.pool import LocalPool, Pool
from guestmem.check.scenario import built_in
from guestmem.check.strategies.states import States
from guestmem.check.work import Found, Hunted, Options, Shard, run_shard

BUGS = Path(__file__).parents[1] / "known_bugs"
NAMES = ["hole_reads_zero", "punch_against_pin", "two_binds_of_one_page"]


class Inline:
    """A pool without processes: work is done when it is asked for, the last submitted first."""

    workers = 2

    def __init__(self) -> None:
        self._work: list[tuple[int, Any, tuple[Any, ...]]] = []
        self.submitted = 0

    def submit(self, function: Any, *arguments: Any) -> int:
        self.submitted += 1
        self._work.append((self.submitted, function, arguments))
        return self.submitted

    def next_done(self) -> tuple[int, Any]:
        number, function, arguments = self._work.pop()
        return number, function(*arguments)

    def close(self) -> None: ...


def quiet(name: str, outcome: object) -> None:
    """Nobody looks."""


def run(pool: Pool, names: list[str], options: Options | None = None, **rest: Any) -> Plan:
    plan = Plan(names, options or Options(), mutants=rest.pop("mutants", []), hunting=rest.pop("hunting", []), **rest)
    plan.run_in(pool, quiet, quiet)
    return plan


def same(plan: Plan, names: list[str]) -> None:
    for name in names:
        alone = explore(built_in()[name], States())
        merged = plan.results[name]
        assert (merged.verdict, merged.states, merged.answers) == (alone.verdict, alone.states, alone.answers)
        assert merged.verdict == EXHAUSTED


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("guestmem.check.plan.SHARD_EXECUTIONS", 40)
    monkeypatch.setattr("guestmem.check.plan.MAX_SHARD_STEPS", 4)


@pytest.mark.usefixtures("small_shards")
def test_shards_visit_what_one_process_visits() -> None:
    pool = Inline()
    plan = run(pool, NAMES)
    assert pool.submitted > 20, "not cut into shards"
    same(plan, NAMES)
    bounded = run(Inline(), ["punch_against_pin"], Options(preemptions=1)).results["punch_against_pin"]
    alone = explore(work.bounded(built_in()["punch_against_pin"], Options(preemptions=1)), States(1))
    assert (bounded.verdict, bounded.states, bounded.bound) == (alone.verdict, alone.states, "preemptions <= 1")


def test_a_shard_brings_back_what_it_left() -> None:
    first = run_shard(Shard("punch_against_pin", "", Options(), 30, States().frontier, {}))
    assert isinstance(first, Found)
    assert first.frontier
    rest = run_shard(Shard("punch_against_pin", "", Options(), 100_000, first.frontier, first.visited))
    assert not rest.frontier
    assert len(first.visited | rest.visited) == explore(built_in()["punch_against_pin"], States()).states
    assert first.fraction + rest.fraction == pytest.approx(1.0)


@pytest.mark.usefixtures("small_shards")
def test_a_violation_and_a_livelock_come_through_shards() -> None:
    for bug, scenario, broken in (
        ("b24_references_before_unmap", "convert_against_pin", "S1"),
        ("b26_prefault_waits_for_deletion", "slot_delete_against_prefault", "L4"),
    ):
        plan = run(Inline(), [scenario], mutant=str(BUGS / f"{bug}.py"))
        assert (plan.results[scenario].verdict, plan.results[scenario].property) == (VIOLATED, broken)
        assert plan.results[scenario].schedule is not None


def test_mutants_and_other_strategies_are_whole_pieces_of_work() -> None:
    mutant = f"{BUGS / 'b11_readonly_gmem_slot.py'}"
    plan = run(Inline(), [], mutants=[mutant], hunting=["two_conversions", "readonly_gmem_slot"])
    hunted = plan.hunted[mutant]
    assert isinstance(hunted, Hunted)
    assert (hunted.found, hunted.property, hunted.scenario) == (True, "S16", "readonly_gmem_slot")
    walked = run(Inline(), ["two_conversions"], Options(strategy="random", executions=7)).results["two_conversions"]
    assert (walked.verdict, walked.executions) == ("limit", 7)


@pytest.mark.usefixtures("small_shards")
def test_a_check_goes_on_where_it_was_saved(tmp_path: Path) -> None:
    class Stops(Inline):
        def next_done(self) -> tuple[int, Any]:
            if self.submitted > 12:
                raise KeyboardInterrupt
            return super().next_done()

    saved = tmp_path / "checkpoint"
    plan = Plan(NAMES, Options(), mutants=[], hunting=[])
    with pytest.raises(KeyboardInterrupt):
        plan.run_in(Stops(), quiet, quiet, saved)
    plan.save(saved)
    again = Plan(NAMES, Options(), mutants=[], hunting=[])
    again.run_in(Inline(), quiet, quiet, saved)
    same(again, NAMES)
    other = Plan(NAMES, Options(preemptions=1), mutants=[], hunting=[])
    with pytest.raises(ValueError, match="of another check"):
        other.run_in(Inline(), quiet, quiet, saved)


def test_two_processes_find_what_one_finds_though_a_worker_is_killed() -> None:
    pool = LocalPool(2)
    killed: list[int] = []

    def kill_one(name: str, result: Result) -> None:
        if not killed:
            killed.append(pool.processes()[0])
            os.kill(killed[0], signal.SIGKILL)

    plan = Plan(NAMES, Options(), mutants=[], hunting=[])
    try:
        plan.run_in(pool, quiet, kill_one)
    finally:
        pool.close()
    assert killed
    assert killed[0] not in pool.processes()
    same(plan, NAMES)


@pytest.fixture
def cluster() -> Iterator[Any]:
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=50
    ) as made:
        yield made


@pytest.mark.filterwarnings("ignore")
def test_a_dask_cluster_finds_what_one_process_finds_though_a_worker_is_killed(cluster: Any) -> None:
    from guestmem.check.cluster import DaskPool

    pool = DaskPool(cluster.scheduler_address)
    killed: list[int] = []

    def kill_one(name: str, result: Result) -> None:
        if not killed:
            killed.append(next(iter(cluster.workers.values())).pid)
            os.kill(killed[0], signal.SIGKILL)

    plan = Plan(NAMES, Options(), mutants=[], hunting=[])
    try:
        assert pool.workers == 2
        plan.run_in(pool, quiet, kill_one)
    finally:
        pool.close()
    assert killed
    same(plan, NAMES)
