"""fingerprint: equal for equal states, across runs and addresses; different when anything that matters differs."""

from __future__ import annotations

import dataclasses

from pyroaring import BitMap64

from guestmem.sched import Lock, LockClass, Scheduler, Task, fingerprint
from tests.explore import Follow


@dataclasses.dataclass
class Node:
    name: str
    next: Node | None = None


def test_equal_states_at_other_addresses_agree() -> None:
    assert fingerprint(Node("a", Node("b"))) == fingerprint(Node("a", Node("b")))
    assert fingerprint(BitMap64([1, 5])) == fingerprint(BitMap64([5, 1]))
    assert fingerprint({"k": [1, (2, 3)]}, {1, 2}) == fingerprint({"k": [1, (2, 3)]}, {2, 1})


def test_different_states_differ() -> None:
    prints = [
        fingerprint(Node("a")),
        fingerprint(Node("b")),
        fingerprint(Node("a", Node("a"))),
        fingerprint(BitMap64([1])),
        fingerprint(BitMap64([2])),
        fingerprint([1, 2]),
        fingerprint([2, 1]),
    ]
    assert len(set(prints)) == len(prints)


def test_sharing_and_cycles_are_part_of_the_state() -> None:
    shared, cycle = Node("x"), Node("c")
    cycle.next = cycle
    assert fingerprint([shared, shared]) != fingerprint([Node("x"), Node("x")])
    assert hash(fingerprint(cycle)) == hash(fingerprint(cycle))


def test_a_parked_tasks_position_and_locals_are_its_state() -> None:
    def states(argument: int) -> list[object]:
        scheduler = Scheduler(Follow())
        lock = Lock(scheduler, LockClass.MMU_LOCK, "lock")

        async def inner(depth: int) -> None:
            async with lock:
                await scheduler.preempt("inside")

        async def outer() -> None:
            for turn in range(2):
                await inner(argument + turn)

        task: Task[None] = scheduler.spawn(outer(), "task")
        seen: list[object] = []
        while not task.done:
            seen.append(fingerprint(task, lock))
            scheduler.step()
        return seen

    once = states(1)
    assert once == states(1)
    assert len(set(once)) == len(once)  # every step is another state, both turns of the loop included
    assert set(once) != set(states(5))


def test_pruning_by_fingerprint_keeps_every_outcome_and_saves_runs() -> None:
    """Three actors on one list: visited states are left alone, as an exploring strategy will do it."""

    def build(policy: Follow) -> tuple[Scheduler, list[int]]:
        scheduler = Scheduler(policy)
        total: list[int] = [0]

        async def add(amount: int) -> None:
            for _ in range(2):
                read = total[0]
                await scheduler.preempt("between")
                total[0] = read + amount

        for amount in (1, 2, 4):
            scheduler.spawn(add(amount), f"add {amount}")
        return scheduler, total

    def search(prune: bool) -> tuple[set[int], int]:
        """The final totals, and how many states were expanded on the way."""
        outcomes: set[int] = set()
        visited: set[object] = set()
        expanded = 0
        stack: list[list[int]] = [[]]
        while stack:
            prefix = stack.pop()
            scheduler, total = build(Follow(prefix))
            for _ in prefix:
                scheduler.step()
            state = fingerprint(total, sorted(scheduler.parked, key=lambda task: task.id))
            if not prune or state not in visited:
                visited.add(state)
                expanded += 1
                if not scheduler.parked:
                    outcomes.add(total[0])
                stack.extend([*prefix, choice] for choice in range(len(scheduler.parked)))
            scheduler.close()
        return outcomes, expanded

    every, tree = search(prune=False)
    pruned, graph = search(prune=True)
    assert pruned == every
    assert len(every) > 2
    assert graph < tree / 4
