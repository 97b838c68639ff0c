"""Who runs next. Nothing but a policy decides it.

A policy sees the tasks that can go on, each parked on the operation it will do next, and names one. *Fifo* serves and
scripts; an exploring policy is handed in from outside and gets a choice before every operation, contended or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from guestmem.sched.scheduler import Task


class Policy(Protocol):
    """The plug for schedulers of every kind.

    `explores` is read once, when the scheduler is made. When it is true every operation of the sched room is a
    scheduling point; when it is false a task runs on until it must wait.
    """

    explores: bool

    def choose(self, ready: Sequence[Task[Any]]) -> Task[Any]:
        """One of `ready`, which is never empty and is in order of parking.

        Each task's `operation` is what it does when chosen: enough for sleep sets and DPOR to judge independence.
        """
        ...

    def fails(self, task: Task[Any], step: str) -> bool:
        """Whether the fallible `step` that `task` is about to do fails; one choice of the schedule like the others."""
        ...


class Fifo:
    """A task runs until it must wait; the longest parked ready task is next. Nothing fails on purpose."""

    explores = False

    def choose(self, ready: Sequence[Task[Any]]) -> Task[Any]:
        return ready[0]

    def fails(self, task: Task[Any], step: str) -> bool:
        return False
