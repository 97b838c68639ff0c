"""Run: one execution of a scenario, choice by choice; the policy that the scheduler of its world asks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from guestmem.check.choices import FAIL, MAX_ACTORS, PASS
from guestmem.check.invariants import Violation
from guestmem.check.scenario import Scenario
from guestmem.sched import Deadlock, Fifo, LockOrderViolation, Task
from guestmem.sched.scheduler import always

_IDLE = Fifo()
_NUMBERED = re.compile(r"([SL]\d+)\b[: ]\s*")


class Nondeterminism(Exception):
    """The same choices led elsewhere: the scenario depends on something besides them."""


class Failures(Protocol):
    """Who decides beyond the replayed part whether a fallible step fails."""

    def fails(self, run: Run, step: str) -> bool: ...


class Run:
    """An execution in progress. `choices` are those made so far, `last` the task that ran last, `failed` the steps that
    were made to fail.

    `preemptions` counts how often a task was left that could have gone on.
    """

    __slots__ = (
        "_failures",
        "_place",
        "_replayed",
        "choices",
        "failed",
        "last",
        "preemptions",
        "scenario",
        "tasks",
        "world",
    )

    explores = True

    def __init__(self, scenario: Scenario, failures: Failures) -> None:
        self.scenario = scenario
        self.world = scenario.build()
        self.choices = bytearray()
        self.failed: list[str] = []
        self.last = -1
        self.preemptions = 0
        self._failures = failures
        self._replayed = b""
        self._place = 0
        self.tasks = self.world.start(self)
        assert len(self.tasks) <= MAX_ACTORS, "too many actors for a schedule"

    # For the scheduler: this is its policy

    def choose(self, ready: Sequence[Task[Any]]) -> Task[Any]:
        raise AssertionError("an explored world runs by advance() alone")

    def fails(self, task: Task[Any], step: str) -> bool:
        if not self.world.failures_left:
            return False
        if self._place < len(self._replayed):
            choice = self._replayed[self._place]
            self._place += 1
            if choice not in (FAIL, PASS):
                raise Nondeterminism(f"{step}: a fallible step where there was none")
            failed = choice == FAIL
        else:
            failed = self._failures.fails(self, step)
        self.choices.append(FAIL if failed else PASS)
        if failed:
            self.world.failures_left -= 1
            self.failed.append(step)
        return failed

    # For the strategy

    def ready(self) -> list[int]:
        """The tasks that can go on, by number."""
        return [
            number
            for number, task in enumerate(self.tasks)
            if (operation := task.operation) is not None and (operation.ready is always or operation.ready())
        ]

    def step(self, number: int) -> None:
        """Let a ready task run to its next operation. Raises: Violation, or what the task raised."""
        if number != self.last:
            if self.last >= 0 and is_preempted(self.tasks[self.last]):
                self.preemptions += 1
            self.last = number
        self.choices.append(number)
        task = self.tasks[number]
        self.world.scheduler.advance(task)
        if task._error is not None:
            raise task._error

    def replay(self, choices: bytes, preemptions: int, checkpoint: tuple[int, bytes] | None = None) -> None:
        """Make the choices of an earlier execution again; `preemptions` is what they count.

        Raises: what the last step raised the first time; Nondeterminism.
        """
        if checkpoint is not None:
            at, digest = checkpoint
            self.replay(choices[:at], preemptions)
            if self.world.digest() != digest:
                raise Nondeterminism(f"after {at} choices the state is another one than it was")
            choices = choices[at:]
        if not choices:
            return
        tasks = self.tasks
        try:
            if self.world.failures_left:
                self._replay_with_failures(choices)
            else:
                self.world.scheduler.advance_along(tasks, choices)
                self.choices += choices
                self.last = choices[-1]
        except (RuntimeError, IndexError, ValueError) as error:
            raise Nondeterminism(f"a replayed task has nothing to do: {error}") from error
        self.preemptions = preemptions
        for task in tasks:
            if task._error is not None:
                raise task._error

    def _replay_with_failures(self, choices: bytes) -> None:
        self._replayed = choices
        self._place = 0
        while self._place < len(choices):
            number = choices[self._place]
            self._place += 1
            self.choices.append(number)
            self.last = number
            self.world.scheduler.advance(self.tasks[number])
        self._replayed = b""

    def follow(self, choices: bytes) -> Iterator[int]:
        """Make `choices` one step after another; yields the number of each task when it has run.

        Raises: Nondeterminism for a choice that there is not; what a step raises.
        """
        self._replayed = choices
        place = 0
        while place < len(choices):
            number = choices[place]
            if number not in self.ready():
                raise Nondeterminism(f"choice {place}: task {number} is not ready")
            self._place = place + 1
            self.step(number)
            place = self._place
            yield number
        self._replayed = b""

    @property
    def done(self) -> bool:
        return not self.world.scheduler.parked

    def end(self) -> None:
        """Nobody is ready. Raises: Deadlock, or Violation for what is left behind."""
        if not self.done:
            raise Deadlock([task for task in self.tasks if not task.done])
        self.world.check_end()
        if self.scenario.never:
            self._check_answers(self.scenario.never)

    def forget(self) -> None:
        """Give everything back. World and run hold each other until here."""
        world = self.world
        world.forget()
        world.scheduler.policy = _IDLE

    def _check_answers(self, never: frozenset[str]) -> None:
        for actor, answers in self.world.answers.items():
            for answer in answers:
                if f"{actor}: {answer}" in never:
                    raise Violation("never", f"{actor} was answered {answer}")


def is_preempted(task: Task[Any]) -> bool:
    """Whether leaving `task` where it stands is a preemption: it could go on, and did not offer to yield."""
    operation = task.operation
    return operation is not None and operation.kind != "resched" and operation.ready()


def broken_property(error: BaseException) -> tuple[str, str]:
    """The property that an error shows to be broken, by its number where it has one, and the facts."""
    if isinstance(error, Violation):
        return error.name, error.facts
    if isinstance(error, LockOrderViolation):
        return "S17", str(error).removeprefix("S17 ")
    if isinstance(error, Deadlock):
        return "L5", str(error)
    if isinstance(error, Nondeterminism):
        return "nondeterminism", str(error)
    if isinstance(error, AssertionError):
        numbered = _NUMBERED.match(str(error))
        if numbered:
            return numbered[1], str(error)[numbered.end() :]
        return "assertion", str(error) or "an assertion without words"
    return "crash", f"{type(error).__name__}: {error}"
