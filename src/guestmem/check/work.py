"""Work: pieces of a search that any process can do, given by name and by value.

A search over states is a set of steps that are still to be made (its frontier) and a set of states that were visited. A
*shard* takes part of the frontier and what is known of the visited states, searches for a while, and brings back what
it visited and what it left. Two shards may visit the same states; the union is what one process would have visited, and
so the verdict is the same. A shard that is lost is done again.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from guestmem.arch import Lifetime
from guestmem.check import mutants
from guestmem.check.choices import Schedule
from guestmem.check.explore import VIOLATED, Exploration, Limits, Result, explore
from guestmem.check.liveness import Edge
from guestmem.check.mutants import Mutant
from guestmem.check.scenario import Scenario, find
from guestmem.check.strategies import STRATEGIES
from guestmem.check.strategies.states import MAX_STATES, ROOT, Open, States

QUICK = (1, 8, 64, 512)
"""Executions of every scenario in the first rounds of a hunt: most mutants show in one of them."""


@dataclasses.dataclass(frozen=True)
class Options:
    """How to search. `preemptions` and `failures` replace the bounds of the scenarios; None leaves them. `lifetime` is
    the policy of arch.Lifetime by its value, "" the usual one; what a scenario sees `sometimes` is said of that one."""

    strategy: str = "states"
    preemptions: int | None = None
    failures: int | None = None
    seed: int = 0
    executions: int = 10_000_000
    seconds: float = 600.0
    max_states: int = MAX_STATES
    lifetime: str = ""

    @property
    def limits(self) -> Limits:
        return Limits(self.executions, self.seconds)


@dataclasses.dataclass(frozen=True)
class Shard:
    """A part of the search of `scenario` (a name, or FILE.py::NAME) under `mutant` (FILE.py:NAME, or "")."""

    scenario: str
    mutant: str
    options: Options
    executions: int
    frontier: list[Open]
    visited: dict[bytes, int]


@dataclasses.dataclass
class Found:
    """What a shard brings back: states, edges and answers that it saw, and what it left open."""

    result: Result
    visited: dict[bytes, int]
    ready: dict[bytes, int]
    edges: list[Edge]
    root: bytes
    frontier: list[Open]
    fraction: float
    full: bool


@dataclasses.dataclass(frozen=True)
class Hunted:
    """What came of a mutant. `expected` says that the broken property is one that the mutant names."""

    name: str
    bug: str
    summary: str
    found: bool
    property: str = ""
    expected: bool = False
    facts: str = ""
    scenario: str = ""
    executions: int = 0
    steps: int = 0
    seconds: float = 0.0
    schedule: Schedule | None = None


@functools.cache
def scenario_named(name: str) -> Scenario:
    """By name, or FILE.py::NAME. Raises: LookupError."""
    file, _, wanted = name.rpartition("::")
    for scenario in find(file or name):
        if scenario.name == (wanted or scenario.name):
            return scenario
    raise LookupError(f"no scenario {name!r}")


def under(mutant: str) -> AbstractContextManager[None]:
    """The product with a mutant in it, or as it is for ""."""
    return mutants.find(mutant).installed() if mutant else nullcontext()


def bounded(scenario: Scenario, options: Options) -> Scenario:
    """The scenario within the bounds that the options ask for."""
    if options.preemptions is not None:
        scenario = dataclasses.replace(scenario, preemptions=options.preemptions)
    if options.failures is not None:
        build = functools.partial(scenario.build, failures=options.failures)
        scenario = dataclasses.replace(scenario, failures=options.failures, build=build)
    if options.lifetime:
        build = functools.partial(scenario.build, lifetime=Lifetime(options.lifetime))
        scenario = dataclasses.replace(scenario, build=build, sometimes=frozenset())
    return scenario


def search(scenario: Scenario, options: Options) -> Exploration:
    """A search of one scenario by one process, not begun."""
    scenario = bounded(scenario, options)
    if options.strategy == "states":
        strategy = States(scenario.preemptions, options.max_states)
        return Exploration(scenario, strategy, options.limits)
    return Exploration(scenario, STRATEGIES[options.strategy](scenario.preemptions, options.seed), options.limits)


def run_search(name: str, mutant: str, options: Options) -> Result:
    """All of a search, for strategies that are not cut into shards."""
    with under(mutant):
        return search(scenario_named(name), options).go()


def run_shard(shard: Shard) -> Found:
    """Search for `shard.executions`, or to the end, or to a violation."""
    scenario = bounded(scenario_named(shard.scenario), shard.options)
    strategy = States(scenario.preemptions, shard.options.max_states)
    strategy.frontier = list(shard.frontier)
    strategy.visited = dict(shard.visited)
    with under(shard.mutant):
        exploration = Exploration(scenario, strategy, Limits(shard.executions, shard.options.seconds))
        result = exploration.go(conclude_at_end=False)
    new = {state: left for state, left in strategy.visited.items() if shard.visited.get(state) != left}
    root = strategy.root if shard.frontier == [ROOT] else b""
    return Found(result, new, strategy.ready, strategy.edges, root, strategy.frontier, strategy.fraction, strategy.full)


def hunt(mutant: str, scenarios: list[str], options: Options) -> Hunted:
    """Run the scenarios against a mutant until one breaks a property that it names: a little of each first, then more
    of those that were seen to reach the mutant's function, then of all, since few executions say little of the others.
    """
    buggy = mutants.find(mutant)
    calls = 0

    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        return buggy.function(*arguments, **named)

    began = time.perf_counter()
    executions = steps = 0
    done: dict[str, int] = dict.fromkeys(scenarios, 0)
    reaching: set[str] = set()
    another: Result | None = None  # what broke and is none of the properties that the mutant names
    with dataclasses.replace(buggy, function=counted).installed():
        for most, reaching_alone in _rounds(options.executions):
            for name in [name for name in scenarios if name in reaching or not reaching_alone]:
                if done[name] >= most:
                    continue
                before = calls
                scenario = bounded(scenario_named(name), options)
                strategy = STRATEGIES[options.strategy](scenario.preemptions, options.seed)
                result = explore(scenario, strategy, Limits(most))
                executions += result.executions
                steps += result.steps
                if calls > before:
                    reaching.add(name)
                done[name] = most if result.why else options.executions
                if result.verdict == VIOLATED and result.property != "sometimes":
                    if result.property in buggy.breaks:
                        return _caught(buggy, result, executions, steps, time.perf_counter() - began)
                    another, done[name] = another or result, options.executions
    seconds = time.perf_counter() - began
    if another is not None:
        return _caught(buggy, another, executions, steps, seconds)
    return Hunted(buggy.name, buggy.bug, buggy.summary, False, executions=executions, steps=steps, seconds=seconds)


def _rounds(executions: int) -> list[tuple[int, bool]]:
    """(executions of a scenario, only of those that reach the mutant) for each round."""
    first, *more = QUICK
    return [(first, False), *((most, True) for most in more), *((most, False) for most in (*more, executions))]


def _caught(mutant: Mutant, result: Result, executions: int, steps: int, seconds: float) -> Hunted:
    return Hunted(
        mutant.name,
        mutant.bug,
        mutant.summary,
        True,
        result.property,
        result.property in mutant.breaks,
        result.facts,
        result.name,
        executions,
        steps,
        seconds,
        result.schedule,
    )
