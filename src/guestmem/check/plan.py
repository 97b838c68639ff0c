"""Plan: everything that one `guestmem check` is to do, by this process alone or by a pool of others.

A pool gets searches over states in shards and everything else whole. What comes back is merged, so the verdict is that
of one process; only the number of executions may differ, as two shards may visit the same state. A plan can be saved
while it runs and taken up again.
"""

from __future__ import annotations

import dataclasses
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from guestmem.check.explore import LIMIT, VIOLATED, Result, conclude
from guestmem.check.pool import Pool
from guestmem.check.strategies.states import ROOT, Open, States
from guestmem.check.work import (
    Found,
    Hunted,
    Options,
    Shard,
    bounded,
    hunt,
    run_search,
    run_shard,
    scenario_named,
    search,
    under,
)

SHARD_EXECUTIONS = 400
MAX_SHARD_STEPS = 32
_SAVE_EVERY_S = 5.0
_FORMAT = 1


@dataclasses.dataclass
class Merged:
    """A search over states that is done in shards. `graph` is the union of what they saw."""

    scenario: str
    mutant: str
    options: Options
    graph: States
    frontier: list[Open]
    out: dict[int, list[Open]]  # shard -> what it was given, so that nothing is lost with it
    result: Result
    answers: set[str]
    began: float

    def absorb(self, number: int, found: Found) -> None:
        """Add what a shard brought back."""
        del self.out[number]
        graph, result = self.graph, self.result
        for state, left in found.visited.items():
            graph.visited[state] = max(left, graph.visited.get(state, left))
        graph.ready.update(found.ready)
        graph.edges += found.edges
        graph.root = graph.root or found.root
        graph.full |= found.full or len(graph.visited) >= self.options.max_states
        self.frontier += found.frontier
        self.answers |= found.result.answers
        result.failed |= found.result.failed
        result.executions += found.result.executions
        result.steps += found.result.steps
        result.fraction = (result.fraction or 0.0) + found.fraction
        if found.result.verdict == VIOLATED and result.verdict != VIOLATED:
            result.verdict, result.property = VIOLATED, found.result.property
            result.facts, result.schedule = found.result.facts, found.result.schedule

    @property
    def over(self) -> bool:
        """Whether no more shards are wanted."""
        late = time.time() - self.began > self.options.seconds
        if late or self.result.executions >= self.options.executions:
            self.result.why = self.result.why or "out of time or executions"
        stopped = self.result.verdict == VIOLATED or self.graph.full or bool(self.result.why)
        return not self.out and (stopped or not self.frontier)

    def next_shard(self) -> tuple[Shard, list[Open]] | None:
        """Some of the frontier, deepest last, as a search of its own."""
        if self.result.verdict == VIOLATED or self.graph.full or self.result.why or not self.frontier:
            return None
        some, self.frontier = self.frontier[:MAX_SHARD_STEPS], self.frontier[MAX_SHARD_STEPS:]
        visited = dict(self.graph.visited)
        return Shard(self.scenario, self.mutant, self.options, SHARD_EXECUTIONS, some, visited), some

    def finish(self) -> Result:
        """The verdict of the whole."""
        result, graph = self.result, self.graph
        scenario = bounded(scenario_named(self.scenario), self.options)
        result.states, result.memory_bytes = graph.states, graph.memory_bytes
        result.answers = frozenset(self.answers)
        result.never_seen = tuple(sorted(scenario.sometimes - self.answers))
        result.seconds = time.time() - self.began
        if result.verdict != VIOLATED and not result.why:
            with under(self.mutant):
                conclude(scenario, graph, result)
        return result


Done = Callable[[str, "Result | Hunted"], None]


class Plan:
    """`scenarios` to search, under `mutant` or as they are; `mutants` to hunt with all of `hunting`."""

    def __init__(
        self, scenarios: list[str], options: Options, *, mutant: str = "", mutants: list[str], hunting: list[str]
    ) -> None:
        self.scenarios = scenarios
        self.options = options
        self.mutant = mutant
        self.mutants = mutants
        self.hunting = hunting
        self.results: dict[str, Result] = {}
        self.hunted: dict[str, Hunted] = {}
        self._merged: dict[str, Merged] = {}

    @property
    def total(self) -> int:
        return len(self.scenarios) + len(self.mutants)

    def run_here(self, done: Done, progress: Callable[[str, Result], None]) -> None:
        """In this process, one after another."""
        for name in self.scenarios:
            if name in self.results:
                continue
            with under(self.mutant):
                exploration = search(scenario_named(name), self.options)
                self._add(name, exploration.go(lambda result, name=name: progress(name, result)), done)  # type: ignore[misc]
        for mutant in self.mutants:
            if mutant not in self.hunted:
                self._add(mutant, hunt(mutant, self.hunting, self.options), done)

    def run_in(
        self, pool: Pool, done: Done, progress: Callable[[str, Result], None], checkpoint: Path | None = None
    ) -> None:
        """By the workers of `pool`; saved to `checkpoint` every few seconds, and taken up from there if it exists."""
        if checkpoint is not None and checkpoint.exists():
            self._load(checkpoint)
        waiting: list[tuple[str, Callable[..., Any], tuple[Any, ...]]] = []
        for name in self.scenarios:
            if name in self.results:
                continue
            if self.options.strategy != "states":
                waiting.append((name, run_search, (name, self.mutant, self.options)))
            elif name not in self._merged:
                self._merged[name] = self._new_merged(name)
        waiting += [
            (name, hunt, (name, self.hunting, self.options)) for name in self.mutants if name not in self.hunted
        ]
        flying: dict[int, str] = {}
        saved = time.monotonic()
        while True:
            self._keep_busy(pool, waiting, flying)
            for name, merged in list(self._merged.items()):
                if merged.over:
                    self._add(name, merged.finish(), done)
                    del self._merged[name]
            if not flying:
                break
            number, outcome = pool.next_done()
            name = flying.pop(number)
            if isinstance(outcome, Found):
                self._merged[name].absorb(number, outcome)
                progress(name, self._merged[name].result)
            else:
                self._add(name, outcome, done)
            if checkpoint is not None and time.monotonic() - saved > _SAVE_EVERY_S:
                saved = time.monotonic()
                self.save(checkpoint)
        if checkpoint is not None:
            self.save(checkpoint)

    def _keep_busy(
        self, pool: Pool, waiting: list[tuple[str, Callable[..., Any], tuple[Any, ...]]], flying: dict[int, str]
    ) -> None:
        """Have two pieces of work for each worker, from as many searches as there are."""
        most = 2 * pool.workers
        going = True
        while going and len(flying) < most:
            going = False
            for name, merged in self._merged.items():
                if len(flying) >= most:
                    return
                shard = merged.next_shard()
                if shard is not None:
                    number = pool.submit(run_shard, shard[0])
                    merged.out[number] = shard[1]
                    flying[number] = name
                    going = True
            if waiting and len(flying) < most:
                name, function, arguments = waiting.pop(0)
                flying[pool.submit(function, *arguments)] = name
                going = True

    def _new_merged(self, name: str) -> Merged:
        scenario = bounded(scenario_named(name), self.options)
        graph = States(scenario.preemptions, self.options.max_states)
        result = Result(scenario.name, LIMIT, scenario.bound)
        return Merged(name, self.mutant, self.options, graph, [ROOT], {}, result, set(), time.time())

    def _add(self, name: str, outcome: Result | Hunted, done: Done) -> None:
        if isinstance(outcome, Hunted):
            self.hunted[name] = outcome
        else:
            self.results[name] = outcome
        done(name, outcome)

    def save(self, path: Path) -> None:
        """Everything that is known, so that another process can go on from here; what is in flight counts as open."""
        for merged in self._merged.values():
            merged.graph.frontier = merged.frontier + [each for given in merged.out.values() for each in given]
        state = (_FORMAT, self.options, self.results, self.hunted, self._merged)
        unfinished = path.with_suffix(path.suffix + ".new")
        unfinished.write_bytes(pickle.dumps(state))
        unfinished.replace(path)

    def _load(self, path: Path) -> None:
        number, options, results, hunted, merged = pickle.loads(path.read_bytes())
        if number != _FORMAT or options != self.options:
            raise ValueError(f"{path} is of another check: remove it, or check with the same options")
        self.results = {name: result for name, result in results.items() if name in self.scenarios}
        self.hunted = {name: result for name, result in hunted.items() if name in self.mutants}
        for name, each in merged.items():
            if name in self.scenarios:
                each.frontier, each.out = each.graph.frontier, {}
                each.began += time.time() - path.stat().st_mtime
                self._merged[name] = each
