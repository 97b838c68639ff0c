"""Small worlds for the explorer's own tests: coroutines on a bare scheduler."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from guestmem.check.scenario import Scenario
from guestmem.sched import Policy, Scheduler, Task, fingerprint

Actors = Callable[["Toy"], dict[str, Coroutine[Any, Any, object]]]


class Toy:
    """A world of `actors`; `shared` is what they share, and what a state is besides the tasks."""

    def __init__(self, actors: Actors, failures: int = 0) -> None:
        self.scheduler = Scheduler()
        self.failures_left = failures
        self.shared: dict[str, Any] = {}
        self.answers: dict[str, tuple[str, ...]] = {}
        self._actors = actors(self)
        self._tasks: list[Task[Any]] = []

    def __fingerprint__(self) -> None:
        """What actors refer to; its state is walked from the roots."""

    def start(self, policy: Policy) -> list[Task[Any]]:
        self.scheduler.policy = policy
        self.scheduler.explores = True
        self._tasks = [self.scheduler.spawn(self._act(name, call), name) for name, call in self._actors.items()]
        return self._tasks

    async def _act(self, name: str, call: Coroutine[Any, Any, object]) -> None:
        self.answers[name] = (str(await call),)

    def digest(self) -> bytes:
        return fingerprint(self.shared, self._tasks, sorted(self.answers.items()), self.failures_left)

    def check_state(self) -> None:
        assert not self.shared.get("broken"), "S1: broken"

    def check_end(self) -> None:
        """Nothing is left behind."""

    def forget(self) -> None:
        self.scheduler.explores = False
        for task in self._tasks:
            task.coroutine.close()
        for call in self._actors.values():
            call.close()


def toy(actors: Actors, **options: Any) -> Scenario:
    """A scenario of a toy world."""
    return Scenario("toy", lambda: Toy(actors, options.get("failures", 0)), **options)
