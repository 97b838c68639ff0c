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
from guestmem.check.liveness import STATEMENTS, livelock, starving
from guestmem.check.run import Nondeterminism, Run, broken_property
from guestmem.check.scenario import Scenario
from guestmem.check.strategies.states import States
from guestmem.check.strategies.strategy import STOP, Start, Strategy

EXHAUSTED, LIMIT, VIOLATED = "exhausted", "limit", "violated"
_REPORT_EVERY_S = 0.2
_RUN_TWICE = 3
_COLLECT_EVERY = 100


@dataclasses.dataclass(frozen=True)
class Limits:
    """Where a search stops: executions, seconds, choices in one execution."""

    executions: int = 10_000_000
    seconds: float = 600.0
    steps: int = 5_000


@dataclasses.dataclass
class Result:
    """What came of a search. `property`, `facts` and `schedule` say what a violation broke and how.

    `never_seen` are the `sometimes` that did not happen; `why` is the limit that was met. Bytes.
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
    never_seen: tuple[str, ...] = ()
    why: str = ""
    memory_bytes: int = 0


Progress = Callable[[Result], None]


class Exploration:
    """A search in progress. `result` is what is known so far."""

    def __init__(
        self, scenario: Scenario, strategy: Strategy, limits: Limits, progress: Progress | None = None
    ) -> None:
        self.scenario = scenario
        self.strategy = strategy
        self.limits = limits
        self.result = Result(scenario.name, LIMIT, scenario.bound)
        self._progress = progress
        self._answers: set[str] = set()

    def go(self) -> Result:
        """Search to the verdict."""
        began = time.perf_counter()
        reported = began
        result, limits = self.result, self.limits
        collecting = gc.isenabled()
        gc.disable()  # an execution's garbage has cycles; collecting it in batches is cheaper
        try:
            while True:
                if result.executions >= limits.executions:
                    result.why = f"{limits.executions} executions"
                    break
                start = self.strategy.start()
                if start is None:
                    self._exhausted()
                    break
                result.executions += 1
                if self._execute(start):
                    break
                if result.executions % _COLLECT_EVERY == 0:
                    gc.collect(0)
                now = time.perf_counter()
                if now - began > limits.seconds:
                    result.why = f"{limits.seconds:g} seconds"
                    break
                if self._progress is not None and now - reported > _REPORT_EVERY_S:
                    reported = now
                    self._note(now - began)
                    self._progress(result)
        finally:
            if collecting:
                gc.enable()
        self._note(time.perf_counter() - began)
        return result

    def _execute(self, start: Start) -> bool:
        """One execution; whether it broke a property."""
        strategy, result, most = self.strategy, self.result, self.limits.steps
        run = Run(self.scenario, strategy)
        try:
            run.replay(start.choices, start.preemptions, start.checkpoint)
            while ready := run.ready():
                number = strategy.choose(run, ready)
                if number == STOP:
                    return False
                run.world.check_state()
                run.step(number)
                if len(run.choices) >= most:
                    result.why = f"{most} steps in one execution"
                    return True
            if not run.done or strategy.end(run):
                choices = bytes(run.choices)
                run.world.check_state()
                run.end()
                for actor, answers in run.world.answers.items():
                    self._answers.update(f"{actor}: {answer}" for answer in answers)
                if result.executions <= _RUN_TWICE:
                    self._run_twice(choices)
        except Exception as error:
            self._violated(error, Schedule(bytes(run.choices)))
            return True
        finally:
            result.steps += len(run.choices)
            run.world.forget()
        return False

    def _violated(self, error: Exception, schedule: Schedule) -> None:
        result = self.result
        result.verdict = VIOLATED
        result.property, result.facts = broken_property(error)
        result.schedule = schedule

    def _run_twice(self, choices: bytes) -> None:
        """The same choices must make the same states. Raises: Nondeterminism."""
        if states_along(self.scenario, choices) != states_along(self.scenario, choices):
            raise Nondeterminism("the same choices made another sequence of states")

    def _exhausted(self) -> None:
        result, strategy = self.result, self.strategy
        if isinstance(strategy, States):
            if strategy.full:
                result.why = f"visited set full with {strategy.states} states"
                return
            if strategy.preemptions is None:
                schedule = livelock(strategy.edges, strategy.ready, strategy.root)
                if schedule is not None:
                    self._livelocked(schedule)
                    return
        if not strategy.exhaustive or getattr(strategy, "cut", False):
            result.why = result.why or "the strategy has nothing more to try"
            return
        result.verdict = EXHAUSTED
        result.never_seen = tuple(sorted(self.scenario.sometimes - self._answers))
        if result.never_seen:
            result.verdict = VIOLATED
            result.property = "sometimes"
            result.facts = f"never in any schedule: {'; '.join(result.never_seen)}"

    def _livelocked(self, schedule: Schedule) -> None:
        result = self.result
        result.verdict = VIOLATED
        result.property, result.facts = describe_livelock(self.scenario, schedule)
        result.schedule = schedule

    def _note(self, seconds: float) -> None:
        result = self.result
        result.seconds = seconds
        result.answers = frozenset(self._answers)
        result.never_seen = tuple(sorted(self.scenario.sometimes - self._answers))
        result.states = getattr(self.strategy, "states", 0)
        result.memory_bytes = getattr(self.strategy, "memory_bytes", 0)


def explore(
    scenario: Scenario, strategy: Strategy, limits: Limits | None = None, progress: Progress | None = None
) -> Result:
    """Search `scenario` by `strategy`; `progress` is called a few times a second with what is known."""
    return Exploration(scenario, strategy, limits or Limits(), progress).go()


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
        run.world.forget()


def describe_livelock(scenario: Scenario, schedule: Schedule) -> tuple[str, str]:
    """Which property a cycle breaks, and its facts."""
    run = Run(scenario, NoFailures())
    try:
        for _ in run.follow(schedule.choices):
            pass
        name = starving(run.tasks)
        waiting = ", ".join(f"{task.name} at {task.operation}" for task in run.tasks if not task.done)
        return name, f"{STATEMENTS[name]} no more: {len(schedule.cycle)} steps repeat for ever, {waiting}"
    finally:
        run.world.forget()
