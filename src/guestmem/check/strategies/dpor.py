"""Dpor: one schedule for each way in which conflicting steps can be ordered; the rest is left out.

Dynamic partial-order reduction with source sets and sleep sets. After a step has run its footprint is known. If it
conflicts with an earlier step of another task and nothing in between orders the two, the other order is another
behaviour: some task that can begin it is added to what will be tried at the earlier point. A task that was tried at a
point sleeps in what follows until a step conflicts with the one it would make.

Keeps nothing but the present path, so it needs no fingerprints and no memory. What it promises is one schedule of each
class: every answer, every deadlock, every property broken by a step of its own. A property of a state that only exists
between two steps that commute is for `States` to find. Loops without an end are cut by the limit on steps.

After Abdulla, Aronis, Jonsson, Sagonas, "Optimal dynamic partial order reduction", POPL 2014, and Flanagan, Godefroid,
"Dynamic partial-order reduction for model checking software", POPL 2005.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack

from guestmem.check.choices import FAIL, ONE, PASS
from guestmem.check.footprint import Footprint, Recorder, conflict
from guestmem.check.machine import Machine
from guestmem.check.run import Run
from guestmem.check.strategies.strategy import SEEN, Start, Stateless


@dataclasses.dataclass
class Node:
    """A point of the present path. `todo` are steps to try from here, each a task and the fates of its fallible steps;
    `slept` the footprints of those that were tried here or sleep since before. `label` is the step that was taken."""

    ready: tuple[int, ...]
    sleep: dict[int, Footprint]
    todo: list[bytes]
    label: bytes = b""
    footprint: Footprint = dataclasses.field(default_factory=dict)
    tried: dict[int, Footprint] = dataclasses.field(default_factory=dict)
    clock: dict[int, int] = dataclasses.field(default_factory=dict)

    @property
    def covered(self) -> set[int]:
        """The tasks that are tried here, were, or need not be."""
        return {label[0] for label in self.todo} | set(self.tried) | set(self.sleep)


class Dpor(Stateless):
    """Source sets and sleep sets, by footprints that are recorded."""

    name = "dpor"
    exhaustive = True

    def __init__(self) -> None:
        self.classes = 0
        self._path: list[Node] = []
        self._depth = 0
        self._fates = 0
        self._open = False
        self._begun = False
        self._recorder = Recorder()
        self._stack = ExitStack()
        self._stack.enter_context(self._recorder.installed())

    def start(self) -> Start | None:
        """Back to the deepest point where something is left to try."""
        if not self._begun:
            self._begun = True
            return self._fresh()
        while self._path:
            node = self._path[-1]
            if node.label:
                task = node.label[0]
                node.tried[task] = _union(node.tried.get(task), node.footprint)
                node.label = b""
            if node.todo:
                node.label = node.todo.pop()
                return self._fresh()
            self._path.pop()
        return None

    def close(self) -> None:
        self._stack.close()

    def choose(self, run: Run, ready: Sequence[int]) -> int:
        self._close_step(run)
        if self._depth == 0:
            self._recorder.begin_execution(_roots(run))
            for task in run.tasks:
                task._send = self._recorder.watched(task._send)
        if self._depth == len(self._path):
            node = self._new_node(run, ready)
            if node is None:
                return SEEN
            self._path.append(node)
        node = self._path[self._depth]
        self._fates = 1
        self._open = True
        self._recorder.begin_step(run.tasks[node.label[0]].name)
        if not isinstance(run.world, Machine):
            self._recorder.cannot_see()
        return node.label[0]

    def fails(self, run: Run, step: str) -> bool:
        node = self._path[self._depth]
        self._recorder.may_fail()
        if self._fates == len(node.label):
            node.todo.append(node.label + ONE[FAIL])
            node.label += ONE[PASS]
        fate = node.label[self._fates]
        self._fates += 1
        return fate == FAIL

    def end(self, run: Run) -> bool:
        self._close_step(run)
        self.classes += 1
        return True

    def _fresh(self) -> Start:
        self._recorder.end_step()
        self._depth = 0
        self._open = False
        return Start()

    def _new_node(self, run: Run, ready: Sequence[int]) -> Node | None:
        """What sleeps here, and a first task that does not; None if all do: the rest was seen from a brother."""
        sleep: dict[int, Footprint] = {}
        if self._path:
            before = self._path[-1]
            asleep = {task: uses for task, uses in (before.sleep | before.tried).items() if task != before.label[0]}
            sleep = {task: uses for task, uses in asleep.items() if not conflict(uses, before.footprint)}
        awake = [task for task in ready if task not in sleep]
        if not awake:
            return None
        first = run.last if run.last in awake else awake[0]
        return Node(tuple(ready), sleep, [], ONE[first])

    def _close_step(self, run: Run) -> None:
        """A step has run: its footprint, what came before it, and which orders it asks for."""
        if not self._open:
            return
        self._open = False
        place = self._depth
        self._depth += 1
        node = self._path[place]
        node.footprint = self._recorder.end_step()
        if place < len(self._path) - 1:
            return  # a part of the path that was looked at before
        task = node.label[0]
        mine = next((self._path[i] for i in range(place - 1, -1, -1) if self._path[i].label[0] == task), None)
        before = mine.clock if mine is not None else {}
        clock = dict(before)
        racing = []
        for earlier in range(place - 1, -1, -1):
            other = self._path[earlier]
            if other.label[0] == task or not conflict(other.footprint, node.footprint):
                continue
            if before.get(other.label[0], -1) < earlier:
                racing.append(earlier)
            for each, at in other.clock.items():
                clock[each] = max(clock.get(each, -1), at)
        clock[task] = place
        node.clock = clock
        for earlier in racing:
            self._reverse(earlier, place, task)

    def _reverse(self, earlier: int, place: int, task: int) -> None:
        """Have the step at `place` also tried before the one at `earlier`."""
        node = self._path[earlier]
        owner = node.label[0]
        after = [at for at in range(earlier + 1, place) if self._path[at].clock.get(owner, -1) < earlier] + [place]
        first: dict[int, int] = {}
        for at in after:
            first.setdefault(self._path[at].label[0], at)
        initials = {
            who for who, at in first.items()
            if not any(self._ordered(before, at) for before in after if before < at)
        }  # fmt: skip
        if initials & node.covered:
            return
        can = [who for who in (task, *sorted(initials)) if who in initials and who in node.ready]
        if can:
            node.todo.append(ONE[can[0]])
        elif first[task] != place:  # else it waited there for this very step, and cannot come first
            node.todo += [ONE[who] for who in node.ready if who not in node.covered]

    def _ordered(self, before: int, after: int) -> bool:
        """Whether the step at `before` happens before the one at `after`."""
        return self._path[after].clock.get(self._path[before].label[0], -1) >= before


def _union(some: Footprint | None, more: Footprint) -> Footprint:
    if some is None:
        return more
    merged = {key: (list(reads), list(writes)) for key, (reads, writes) in some.items()}
    for key, (reads, writes) in more.items():
        known = merged.setdefault(key, ([], []))
        known[0].extend(reads)
        known[1].extend(writes)
    return merged


def _roots(run: Run) -> list[object]:
    """What the tasks can reach of a machine."""
    world: object = run.world
    return [
        getattr(world, name)
        for name in ("inodes", "vms", "userspace", "iommu", "identities", "pool")
        if hasattr(world, name)
    ]
