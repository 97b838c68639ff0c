"""Witness: a schedule that breaks a property, made as simple as it gets and then looked at step by step.

Shrinking searches again, cheapest states first, for a violation of the same property; what it meets first has the
fewest preemptions, then the fewest steps, then the fewest actors that run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from guestmem.check.choices import Schedule
from guestmem.check.explore import LIMIT, VIOLATED, Limits, NoFailures, Result, describe_livelock, explore
from guestmem.check.machine import Machine
from guestmem.check.run import Run, broken_property
from guestmem.check.scenario import Scenario
from guestmem.check.strategies.best import Best
from guestmem.check.strategies.replay import Replay
from guestmem.memory import Access, Inode, PageIndex
from guestmem.sched import Task
from guestmem.trace.events import Event

SHRINK_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a story. `does` is the operation that the task was parked on, `where` the function it went on in.

    `locks` are those that are held after it, `pages` what each page of each file then is; `failed` the fallible steps
    that failed on the way.
    """

    number: int
    actor: str
    does: str
    where: str
    events: tuple[Event, ...]
    locks: tuple[str, ...]
    pages: tuple[str, ...]
    failed: bool


@dataclasses.dataclass(frozen=True)
class Story:
    """The steps of a schedule, and what it breaks; `cycle_at` is the step from which it repeats for ever."""

    scenario: str
    schedule: Schedule
    actors: tuple[str, ...]
    steps: tuple[Step, ...]
    property: str
    facts: str
    cycle_at: int | None = None


def shrink(scenario: Scenario, result: Result, seconds: float = SHRINK_SECONDS) -> Schedule:
    """The simplest schedule for the violation in `result` that is found in `seconds`; at worst its own."""
    assert result.schedule is not None
    if result.schedule.cycle:
        return result.schedule  # a shortest path already
    found = explore(scenario, Best(), Limits(seconds=seconds))
    if found.verdict == VIOLATED and found.property == result.property and found.schedule is not None:
        return found.schedule
    return result.schedule


def replay(scenario: Scenario, schedule: Schedule) -> Result:
    """Run one schedule, with every check: *violated*, or *limit*, for one schedule proves nothing."""
    if not schedule.cycle:
        return explore(scenario, Replay(schedule.choices))
    result = Result(scenario.name, LIMIT, scenario.bound, executions=1, schedule=schedule)
    run = Run(scenario, NoFailures())
    try:
        for _ in run.follow(schedule.choices):
            run.world.check_state()
        before = run.world.digest()
        for _ in run.follow(schedule.cycle):
            run.world.check_state()
        if run.world.digest() == before:
            result.verdict = VIOLATED
            result.property, result.facts = describe_livelock(scenario, schedule)
    finally:
        run.forget()
    return result


def tell(scenario: Scenario, schedule: Schedule) -> Story:
    """Run a schedule and note every step."""
    run = Run(scenario, NoFailures())
    machine = run.world
    assert isinstance(machine, Machine), "a story needs a machine"
    seen: list[Event] = []
    machine.tracer.listen(seen.append)
    steps: list[Step] = []
    choices = schedule.choices + schedule.cycle
    before = [_doing(task) for task in run.tasks]
    broken = ("", "")
    try:
        made = 0
        following = run.follow(choices)
        while True:
            seen.clear()
            try:
                number = next(following, None)
                if number is None:
                    break
                machine.check_state()
            except Exception as error:
                broken = broken_property(error)
                number = run.last
            failed = 0xFF in run.choices[made:]
            made = len(run.choices)
            steps.append(_step(run, machine, number, before[number], tuple(seen), failed))
            before = [_doing(task) for task in run.tasks]
            if broken[0]:
                break
        if not broken[0] and not run.ready():
            try:
                run.end()
            except Exception as error:
                broken = broken_property(error)
    finally:
        run.forget()
    cycle_at = None
    if schedule.cycle:
        broken = describe_livelock(scenario, schedule)
        cycle_at = Schedule(schedule.choices).steps
    names = tuple(name for name, _ in machine.actors)
    return Story(scenario.name, schedule, names, tuple(steps), *broken, cycle_at)


def _step(
    run: Run, machine: Machine, number: int, before: tuple[str, str], events: tuple[Event, ...], failed: bool
) -> Step:
    task = run.tasks[number]
    does, where = before
    locks = tuple(f"{other.name}: {', '.join(lock.name for lock in other.held)}" for other in run.tasks if other.held)
    return Step(len(machine_steps(run)), task.name, does, where, events, locks, tuple(pages_of(machine)), failed)


def machine_steps(run: Run) -> bytes:
    """The task choices of a run, without the fates of fallible steps."""
    return bytes(choice for choice in run.choices if choice < len(run.tasks))


def pages_of(machine: Machine) -> Iterator[str]:
    """Each page of each file in a few words: access, who maps it, who holds it."""
    for inode in machine.inodes:
        if not inode.destroyed:
            for page in range(inode.pages):
                yield f"page {inode.number}.{page} {_page(machine, inode, PageIndex(page))}"


def _page(machine: Machine, inode: Inode, page: PageIndex) -> str:
    pfn = inode.folios.pfn(page)
    words = [inode.access_at(page).value, "absent" if pfn is None else f"pfn {pfn}"]
    for process in machine.userspace.processes:
        entries = process.mm.page_table.leaves()
        if any(entry.pfn == pfn and entry.folios is inode.folios for _, _, entry in entries):
            words.append(f"mm {process.mm.number}")
    for kvm in machine.vms:
        for access in Access:
            if any(leaf.pfn == pfn for _, _, leaf in kvm.stage2.tables[access].leaves()):
                words.append(f"vm {kvm.number} {access.value}")
    held = inode.folios.references.get(inode.folios.head(page), 0)
    if held:
        words.append(f"{held} ref{'s' * (held > 1)}")
    if page in inode.folios.poisoned:
        words.append("poisoned")
    return ", ".join(words)


def _doing(task: Task[Any]) -> tuple[str, str]:
    """What a task will do next, and the function of the product that does it."""
    if task.operation is None:
        return "", ""
    where = ""
    coroutine: Any = task.coroutine
    while coroutine is not None:
        frame = getattr(coroutine, "cr_frame", None) or getattr(coroutine, "gi_frame", None)
        if frame is None:
            break
        name = frame.f_code.co_qualname
        if "/sched/" not in frame.f_code.co_filename:
            where = f"{name.replace('.<locals>', '')}:{frame.f_lineno}"
        coroutine = getattr(coroutine, "cr_await", None) or getattr(coroutine, "gi_yieldfrom", None)
    operation = task.operation
    subject = getattr(operation.subject, "name", operation.subject)
    return f"{operation.kind} {subject}" if operation.kind != "start" else "start", where
