"""Liveness: what must happen in the end, when every task that can run gets to run.

A *deadlock* is a state in which nobody can go on. A *livelock* is a part of the state graph that a fair scheduler can
stay in for ever: a set of states, each reachable from each, in which every task either runs on the way round or is
somewhere on it not ready. Nothing has ended on the way, since the states repeat. The maximal such sets decide, so one
pass over the strongly connected components of the visited graph is complete, within the bounds of the search.

A search that keeps no graph (random, PCT, DPOR) uses a starvation bound in place of this: after so many steps the rest
of the execution is run round robin, and must end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple

from guestmem.check.choices import MAX_ACTORS, Schedule
from guestmem.sched import Task


class Edge(NamedTuple):
    """A step of the state graph: what was chosen in state `source`, and where it led."""

    source: bytes
    choices: bytes
    target: bytes


def livelock(edges: list[Edge], ready: dict[bytes, int], root: bytes) -> Schedule | None:
    """A schedule into a fair cycle and once around it; None if there is none.

    `ready` has for each state a bit for each task that is ready in it.
    """
    successors: dict[bytes, list[Edge]] = {}
    for edge in edges:
        successors.setdefault(edge.source, []).append(edge)
    for component in _components(successors):
        members = set(component)
        inside = [edge for state in component for edge in successors[state] if edge.target in members]
        if not inside:
            continue
        always = -1
        for state in component:
            always &= ready[state]
        ran = 0
        for edge in inside:
            ran |= 1 << edge.choices[0]
        if always & ~ran:
            continue
        path = _path(successors, root, members)
        entry = path[-1].target if path else root
        cycle = _round(successors, entry, members, inside, ready)
        return Schedule(b"".join(edge.choices for edge in path), b"".join(edge.choices for edge in cycle))
    return None


def starving(tasks: Iterable[Task[Any]]) -> str:
    """Which of L1, L2, L4, L6 it is that the tasks of a livelock do not get done."""
    found = set()
    for task in tasks:
        if task.done:
            continue
        operation = task.operation
        if operation is not None and operation.kind == "synchronize":
            found.add("L6" if str(operation.subject).startswith("users of") else "L4")
        chain = set(_functions(task.coroutine))
        if chain & {"page_fault", "_pre_fault_page", "AddressSpace.touch"}:
            found.add("L2")
        if "Inode.convert" in chain:
            found.add("L1")
    return min(found, key=["L4", "L6", "L1", "L2"].index, default="L5")


def _functions(coroutine: Any) -> Iterable[str]:
    while coroutine is not None:
        code = getattr(coroutine, "cr_code", None) or getattr(coroutine, "gi_code", None)
        if code is None:
            return
        yield code.co_qualname
        coroutine = getattr(coroutine, "cr_await", None) or getattr(coroutine, "gi_yieldfrom", None)


def _components(successors: dict[bytes, list[Edge]]) -> Iterable[list[bytes]]:
    """Strongly connected components with an edge inside, by Tarjan's algorithm without recursion."""
    number: dict[bytes, int] = {}
    low: dict[bytes, int] = {}
    stack: list[bytes] = []
    open_: set[bytes] = set()
    for start in successors:
        if start in number:
            continue
        work = [(start, iter(successors[start]))]
        number[start] = low[start] = len(number)
        stack.append(start)
        open_.add(start)
        while work:
            state, edges = work[-1]
            for edge in edges:
                target = edge.target
                if target not in successors:
                    continue
                if target not in number:
                    number[target] = low[target] = len(number)
                    stack.append(target)
                    open_.add(target)
                    work.append((target, iter(successors[target])))
                    break
                if target in open_:
                    low[state] = min(low[state], number[target])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[state])
                if low[state] == number[state]:
                    component: list[bytes] = []
                    while not component or component[-1] != state:
                        component.append(stack.pop())
                        open_.remove(component[-1])
                    if len(component) > 1 or any(edge.target == state for edge in successors[state]):
                        yield component


def _path(successors: dict[bytes, list[Edge]], start: bytes, goals: set[bytes]) -> list[Edge]:
    """A shortest way from `start` into `goals`."""
    if start in goals:
        return []
    came: dict[bytes, Edge] = {}
    queue = deque([start])
    while queue:
        for edge in successors.get(queue.popleft(), ()):
            if edge.target == start or edge.target in came:
                continue
            came[edge.target] = edge
            if edge.target in goals:
                return _back(came, start, edge.target)
            queue.append(edge.target)
    raise AssertionError("a visited state that cannot be reached")


def _back(came: dict[bytes, Edge], start: bytes, state: bytes) -> list[Edge]:
    path = []
    while state != start:
        path.append(came[state])
        state = came[state].source
    return path[::-1]


def _round(
    successors: dict[bytes, list[Edge]], entry: bytes, members: set[bytes], inside: list[Edge], ready: dict[bytes, int]
) -> list[Edge]:
    """A way from `entry` back to it, inside the component, on which every task runs or is once not ready."""
    within = {state: [edge for edge in successors[state] if edge.target in members] for state in members}
    here = entry
    way: list[Edge] = []
    for task in sorted({edge.choices[0] for edge in inside}):
        if any(edge.choices[0] == task for edge in way):
            continue
        wanted = {edge.source: edge for edge in inside if edge.choices[0] == task}
        way += [*_path(within, here, set(wanted))]
        here = way[-1].target if way else here
        step = wanted[here]
        way.append(step)
        here = step.target
    for task in range(MAX_ACTORS):
        passed = {entry, *(edge.target for edge in way)}
        if all(ready[state] >> task & 1 for state in passed) and all(edge.choices[0] != task for edge in way):
            way += _path(within, here, {state for state in members if not ready[state] >> task & 1})
            here = way[-1].target
    return way + _path(within, here, {entry})
