"""Explore: the loop that runs one execution after another until nothing is left, a limit is met, or a property breaks.

A verdict is one of three. *exhausted*: every schedule within the scenario's bound is accounted for. *limit*: the search
stopped first; nothing is claimed, and nobody may take it for a pass of what was not run. *violated*: some schedule
breaks a property, and here it is.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable

from guestmem.check.choices import Schedule
from guestmem.check.invariants import OTHERS, Violation
from guestmem.check.liveness import livelock, starving
from guestmem.check.run import Nondeterminism, Run, broken_property
from guestmem.check.scenario import Scenario
from guestmem.check.strategies.strategy import SEEN, STOP, Start, Strategy

EXHAUSTED, LIMIT, VIOLATED = "exhausted", "limit", "violated"
_REPORT_EVERY_S = 0.2
_RUN_TWICE = 3
_COLLECT_AT = 20_000  # objects; an execution's garbage has cycles, and collecting it in batches is cheaper


@dataclasses.dataclass(frozen=True)
class Limits:
    """Where a search stops: executions, seconds. `steps` is the starvation bound: an execution that takes as many is
    then run round robin, and must end within as many again."""

    executions: int = 10_000_000
    seconds: float = 600.0
    steps: int = 2_000


@dataclasses.dataclass
class Result:
    """What came of a search. `property`, `facts` and `schedule` say what a violation broke and how.

    `answers` are those given, `failed` the steps that were made to fail, each in some execution; `never_seen` are the
    `sometimes` that did not happen; `why` is the limit that was met. `fraction` is how much of the
    search was done, if that is known. Bytes.
    """

    name: str
    verdict: str
    bound: str
    executions: int = 0
    states: int = 0
    steps: int = 0
    seconds: float = 0.0
    property: str = ""
    facts: str = ""
    schedule: Schedule | None = None
    answers: frozenset[str] = frozenset()
    failed: frozenset[str] = frozenset()
    never_seen: tuple[str, ...] = ()
    why: str = ""
    memory_bytes: int = 0
    fraction: float | None = None


Progress = Callable[[Result], None]


class Exploration:
    """A search in progress. `result` is what is known so far."""

    def __init__(self, scenario: Scenario, strategy: Strategy, limits: Limits) -> None:
        self.scenario = scenario
        self.strategy = strategy
        self.limits = limits
        self.result = Result(scenario.name, LIMIT, scenario.bound)
        self._answers: set[tuple[str, tuple[str, ...]]] = set()

    def go(self, progress: Progress | None = None, conclude_at_end: bool = True) -> Result:
        """Search to the verdict; without `conclude_at_end` a search with nothing left has none, as a part of one."""
        began = time.perf_counter()
        reported = began
        result, limits = self.result, self.limits
        collecting = gc.isenabled()
        gc.disable()
        try:
            while True:
                if result.executions >= limits.executions:
                    result.why = f"{limits.executions} executions"
                    break
                start = self.strategy.start()
                if start is None:
                    self._note(0.0)
                    if conclude_at_end:
                        conclude(self.scenario, self.strategy, result)
                    break
                result.executions += 1
                if self._execute(start):
                    break
                if gc.get_count()[0] > _COLLECT_AT:
                    gc.collect(0)
                now = time.perf_counter()
                if now - began > limits.seconds:
                    result.why = f"{limits.seconds:g} seconds"
                    break
                if progress is not None and now - reported > _REPORT_EVERY_S:
                    reported = now
                    self._note(now - began)
                    progress(result)
        finally:
            self.strategy.close()
            if collecting:
                gc.enable()
        self._note(time.perf_counter() - began)
        return result

    def _execute(self, start: Start) -> bool:
        """One execution; whether it broke a property."""
        strategy, most = self.strategy, self.limits.steps
        run = Run(self.scenario, strategy)
        try:
            run.replay(start.choices, start.preemptions, start.checkpoint)
            while ready := run.ready():
                number = strategy.choose(run, ready)
                if number == SEEN:
                    return False
                run.world.check_state()
                if number == STOP:
                    return False
                run.step(number)
                if len(run.choices) >= most:
                    self._let_all_run(run)
            if not run.done or strategy.end(run):
                self._look_at_end(run)
        except Exception as error:
            self._violated(error, Schedule(bytes(run.choices)))
            return True
        finally:
            self.result.steps += len(run.choices)
            if not self.result.failed.issuperset(run.failed):
                self.result.failed |= frozenset(run.failed)
            run.forget()
        return False

    def _look_at_end(self, run: Run) -> None:
        world = run.world
        world.check_state()
        run.end()
        self._answers.update(world.answers.items())
        if self.result.executions <= _RUN_TWICE:
            self._run_twice(bytes(run.choices))

    def _let_all_run(self, run: Run) -> None:
        """The starvation bound: an execution that is this long goes on round robin, and must then end."""
        for _ in range(self.limits.steps):
            ready = run.ready()
            if not ready:
                return
            run.step(next((number for number in ready if number > run.last), ready[0]))
        name = starving(run.tasks)
        raise Violation(name, f"not done after {self.limits.steps} steps in which everybody could run")

    def _violated(self, error: Exception, schedule: Schedule) -> None:
        result = self.result
        result.verdict = VIOLATED
        result.property, result.facts = broken_property(error)
        result.schedule = schedule

    def _run_twice(self, choices: bytes) -> None:
        """The same choices must make the same states. Raises: Nondeterminism."""
        if states_along(self.scenario, choices) != states_along(self.scenario, choices):
            raise Nondeterminism("the same choices made another sequence of states")

    def _note(self, seconds: float) -> None:
        result = self.result
        result.seconds = seconds
        result.answers = frozenset(f"{actor}: {answer}" for actor, answers in self._answers for answer in answers)
        result.never_seen = tuple(sorted(self.scenario.sometimes - result.answers))
        result.fraction = self.strategy.fraction
        graph = self.strategy.graph
        if graph is not None:
            result.states, result.memory_bytes = graph.states, graph.memory_bytes


def explore(
    scenario: Scenario, strategy: Strategy, limits: Limits | None = None, progress: Progress | None = None
) -> Result:
    """Search `scenario` by `strategy`; `progress` is called a few times a second with what is known."""
    return Exploration(scenario, strategy, limits or Limits()).go(progress)


def conclude(scenario: Scenario, strategy: Strategy, result: Result) -> None:
    """Nothing is left to try: the verdict, which looks at liveness and at what never happened."""
    graph = strategy.graph
    if graph is not None and graph.full:
        result.why = f"visited set full with {graph.states} states"
        return
    if not strategy.exhaustive:
        result.why = "the strategy has nothing more to try"
        return
    if graph is not None and graph.preemptions is None:
        schedule = livelock(graph.edges, graph.ready, graph.root)
        if schedule is not None:
            result.verdict = VIOLATED
            result.property, result.facts = describe_livelock(scenario, schedule)
            result.schedule = schedule
            return
    result.verdict = EXHAUSTED
    if result.never_seen:
        result.verdict = VIOLATED
        result.property = "sometimes"
        result.facts = f"never in any schedule: {'; '.join(result.never_seen)}"


class NoFailures:
    """For a replay that goes no further than its choices."""

    def fails(self, run: Run, step: str) -> bool:
        return False


def states_along(scenario: Scenario, choices: bytes) -> list[bytes]:
    """The state after each step of a schedule."""
    run = Run(scenario, NoFailures())
    try:
        return [run.world.digest() for _ in run.follow(choices)]
    finally:
        run.forget()


def describe_livelock(scenario: Scenario, schedule: Schedule) -> tuple[str, str]:
    """Which property a cycle breaks, and its facts."""
    run = Run(scenario, NoFailures())
    try:
        for _ in run.follow(schedule.choices):
            pass
        name = starving(run.tasks)
        waiting = ", ".join(f"{task.name} at {task.operation}" for task in run.tasks if not task.done)
        return name, f"{OTHERS[name]} no more: {len(schedule.cycle)} steps repeat for ever, {waiting}"
    finally:
        run.forget()
