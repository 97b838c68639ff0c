"""Tasks and the loop that runs them: the place where every schedule of guestmem is made.

A task is a coroutine. It gives the processor away only by parking on an `Operation`: what it will do next, and
whether it can do it now. The loop asks the policy for one of the tasks that can, and resumes it; the resumed task does
its operation at once and runs to its next one. So between two awaits nothing else runs, and the source itself shows
where another CPU may come in.

Two consequences carry the explorer: a schedule is the list of the policy's choices, and before each choice the next
operation of every task is known. Readiness is asked, not signalled: with the few dozen tasks there are, a scan is
cheaper to understand than wake-up lists and cannot lose one. (`WaitQueue` does model lost wake-ups, since the kernel
can have them.)

After Trio's and Loom's schedulers; unlike Trio there is no I/O here, unlike Loom no thread.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Coroutine, Generator, Sequence
from typing import Any, Generic, TypeVar

from guestmem.sched.lock_order import LockClass, LockOrderViolation
from guestmem.sched.policy import Fifo, Policy
from guestmem.sched.timers import Timers

T = TypeVar("T")


class Operation:
    """What a parked task does next.

    `kind` is a verb of the sched room ("lock", "preempt", ...), `subject` the thing it is done to (a lock, a label),
    `ready` tells whether it can be done now and has no side effect.
    """

    __slots__ = ("kind", "ready", "subject")

    def __init__(self, kind: str, subject: object, ready: Callable[[], bool]) -> None:
        self.kind = kind
        self.subject = subject
        self.ready = ready

    def __repr__(self) -> str:
        return f"{self.kind} {self.subject}"


def always() -> bool:
    return True


class HeldLock:
    """What `Task.held` contains: a lock as its holder knows it."""

    __slots__ = ("lock_class", "name")

    def __init__(self, lock_class: LockClass, name: str) -> None:
        self.lock_class = lock_class
        self.name = name


class Task(Generic[T]):
    """A coroutine under the scheduler's rule.

    `held` are the locks that the task holds, outermost first. `operation` is what it is parked on; a task that runs or
    has ended has none. `turns` counts how often `Scheduler.advance` has resumed it. `signal_pending` is set by whoever
    sends it a signal; long operations look at it and stop.
    """

    __slots__ = (
        "_error",
        "_result",
        "_send",
        "coroutine",
        "done",
        "held",
        "id",
        "joined",
        "name",
        "operation",
        "signal_pending",
        "turns",
    )

    def __init__(self, number: int, name: str, coroutine: Coroutine[Operation, None, T]) -> None:
        self.id = number
        self.name = name
        self.coroutine = coroutine
        self._send = coroutine.send
        self.operation: Operation | None = None
        self.held: list[HeldLock] = []
        self.done = False
        self.joined = False
        self.signal_pending = False
        self.turns = 0
        self._result: T | None = None
        self._error: BaseException | None = None

    def __repr__(self) -> str:
        return f"<Task {self.id} {self.name}: {'done' if self.done else self.operation or 'running'}>"

    def take(self, lock: HeldLock) -> None:
        self.held.append(lock)

    def drop(self, lock: HeldLock) -> None:
        held = self.held
        if held and held[-1] is lock:
            held.pop()
        else:
            held.remove(lock)

    def check_order(self, lock: HeldLock) -> None:
        """Raise LockOrderViolation unless `lock` comes after all that the task holds (S17)."""
        held = self.held
        if held and held[-1].lock_class >= lock.lock_class:
            raise LockOrderViolation(self.name, lock.name, [h.name for h in held])

    def might_lock(self, lock_class: LockClass) -> None:
        """Raise LockOrderViolation if a lock of this class could not be taken here. Source: lockdep's might_lock()."""
        held = self.held
        if held and held[-1].lock_class >= lock_class:
            raise LockOrderViolation(self.name, f"(maybe) {lock_class.name}", [h.name for h in held])

    def outcome(self) -> T:
        """The coroutine's result, or its exception raised here."""
        self.joined = True
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]

    @property
    def failed(self) -> bool:
        return self._error is not None


class TaskKilled(BaseException):
    """Thrown into the tasks that are left when their scheduler closes."""


class Deadlock(AssertionError):
    """No task can go on and some are waiting (property L5)."""

    def __init__(self, waiting: list[Task[Any]]) -> None:
        self.waiting = waiting
        lines = []
        for task in waiting:
            holding = ", ".join(lock.name for lock in task.held) or "nothing"
            lines.append(f"{task.name} waits for {task.operation}, holding {holding}")
        super().__init__("deadlock: " + "; ".join(lines))


@types.coroutine
def park(operation: Operation) -> Generator[Operation, None, None]:
    """Give the processor away; returns when the policy chose this task and `operation` is ready."""
    yield operation


class _Points(dict[str, Operation]):
    """The operations of labelled points. They have no state, so one for each label does for all who come by."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self._kind = kind

    def __missing__(self, label: str) -> Operation:
        operation = self[label] = Operation(self._kind, label, always)
        return operation


_PREEMPT = _Points("preempt")
_RESCHED = _Points("resched")


class Scheduler:
    """The loop. One for each Host; every lock, count and queue of that Host belongs to it."""

    def __init__(self, policy: Policy | None = None) -> None:
        self.policy: Policy = policy if policy is not None else Fifo()
        self.explores = self.policy.explores
        self.current: Task[Any] | None = None
        self.parked: list[Task[Any]] = []
        self.steps = 0
        self.observers: list[Callable[[Task[Any]], None]] = []
        self.timers = Timers()
        self._next_id = 0

    # Tasks

    def spawn(self, coroutine: Coroutine[Any, None, T], name: str) -> Task[T]:
        """A new task, parked before its first line."""
        task = Task(self._next_id, name, coroutine)
        self._next_id += 1
        task.operation = Operation("start", name, always)
        self.parked.append(task)
        return task

    async def join(self, task: Task[T]) -> T:
        """Wait until `task` has ended; its result, or its exception."""
        task.joined = True
        if self.explores or not task.done:
            await park(Operation("join", task.name, lambda: task.done))
        return task.outcome()

    # Points where others may run

    @types.coroutine
    def preempt(self, label: str) -> Generator[Operation, None, None]:
        """A place where the kernel could be interrupted. Under fifo nothing happens."""
        if self.explores:
            yield _PREEMPT[label]

    @types.coroutine
    def cond_resched(self, label: str) -> Generator[Operation, None, None]:
        """Let every other ready task run first, in every mode. Named after the kernel's."""
        if self.explores or self.parked:
            yield _RESCHED[label]

    def fails(self, step: str) -> bool:
        """Whether the policy wants the fallible `step` (an allocation, a copy) to fail here."""
        return self.explores and self.policy.fails(self._running(), step)

    @property
    def signal_pending(self) -> bool:
        """Whether the running task was sent a signal; an exploring policy may send one here."""
        task = self._running()
        if self.explores and not task.signal_pending and self.policy.fails(task, "signal"):
            task.signal_pending = True
        return task.signal_pending

    # The loop

    def step(self) -> bool:
        """Resume one ready task up to its next operation. False if none is ready."""
        ready = [task for task in self.parked if task.operation.ready()]  # type: ignore[union-attr]
        if not ready:
            return False
        task = self.policy.choose(ready)
        self.parked.remove(task)
        self._resume(task)
        return True

    def advance(self, task: Task[Any]) -> None:
        """Resume a parked task that is ready; it keeps its place among the parked. For those who choose themselves."""
        self.advance_along((task,), b"\0")

    def advance_along(self, tasks: Sequence[Task[Any]], choices: bytes) -> None:
        """Resume the task of each number in `choices`, one after another, each of which must be parked and ready.

        What an explorer does millions of times: no list is searched, no observer called, next to nothing allocated.
        Raises: RuntimeError for a task that has ended.
        """
        for number in choices:
            task = self.current = tasks[number]
            task.turns += 1
            try:
                task.operation = task._send(None)
            except StopIteration as end:
                task._result = end.value
                self._end(task)
            except (Exception, TaskKilled) as error:
                if task.done:
                    raise
                task._error = error
                self._end(task)
        self.current = None

    def _end(self, task: Task[Any]) -> None:
        task.done = True
        task.operation = None
        self.parked.remove(task)
        if task.held and not task.failed:
            task._error = AssertionError(_ended_holding(task))

    def run(self, coroutine: Coroutine[Any, None, T], name: str = "script") -> T:
        """The blocking facade: run `coroutine` as a task until it ends, others when it waits; its result.

        Raises: Deadlock when it waits, nobody can go on and no timer runs; what `coroutine` raises; RuntimeError inside
        a task.
        """
        if self.current is not None:
            coroutine.close()
            raise RuntimeError(f"blocking call inside task {self.current.name!r}: await it")
        task = self.spawn(coroutine, name)
        if not self.explores:  # fifo: the caller is the task that runs, until it must wait
            self.parked.pop()
            self._resume(task)
        while not task.done:
            if not self.step() and not self.timers.sleep():
                raise Deadlock(list(self.parked))
        return task.outcome()

    def begin(self, coroutine: Coroutine[Any, None, T], name: str) -> Task[T]:
        """A new task, run to its first wait at once. For a loop that steps the scheduler itself and has fifo's rule."""
        assert self.current is None and not self.explores, "begin is for the loop around a fifo scheduler"
        task = self.spawn(coroutine, name)
        self.parked.pop()
        self._resume(task)
        return task

    def drain(self) -> None:
        """Run until no task is ready. Raises Deadlock if some then still wait."""
        while self.step():
            pass
        if self.parked:
            raise Deadlock(list(self.parked))

    def close(self) -> None:
        """Kill the tasks that are left: each unwinds as a killed process leaves the kernel, giving back what it holds.

        Under fifo from now on, whatever the policy was. Tasks that deadlock even so are dropped where they are.
        """
        self.policy = Fifo()
        self.explores = False
        for task in list(self.parked):
            self.parked.remove(task)
            self._resume(task, TaskKilled())
        while self.step():
            pass
        for task in self.parked:
            task.coroutine.close()
        self.parked.clear()

    def _running(self) -> Task[Any]:
        if self.current is None:
            raise RuntimeError("outside a task: use Scheduler.run")
        return self.current

    def _resume(self, task: Task[Any], killed: TaskKilled | None = None) -> None:
        self.current = task
        task.operation = None
        self.steps += 1
        try:
            task.operation = task.coroutine.throw(killed) if killed else task.coroutine.send(None)
        except StopIteration as end:
            task.done = True
            task._result = end.value
        except (Exception, TaskKilled) as error:
            task.done = True
            task._error = error
        else:
            self.parked.append(task)
        finally:
            self.current = None
        if task.done and task.held and not task.failed:
            raise AssertionError(_ended_holding(task))
        for observer in self.observers:
            observer(task)


def _ended_holding(task: Task[Any]) -> str:
    return f"task {task.name!r} ended holding {', '.join(lock.name for lock in task.held)}"
