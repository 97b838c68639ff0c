"""States: depth first over states instead of schedules. A state that was visited is not gone into again.

Two schedules that lead to one state have the same futures, so one of them is enough, for every property of states and
for every `sometimes` (answers are part of the state). With a bound on preemptions a state is known by which task ran
last, and is gone into again if it is reached with more preemptions left.

Keeps the graph of what it visited, for liveness: with a bound on preemptions there is none, as cycles are cut. The
visited set is bounded: when it is full the search stops, and says so.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

from guestmem.check.choices import FAIL
from guestmem.check.liveness import Edge
from guestmem.check.run import Run, is_preempted
from guestmem.check.strategies.dfs import branches
from guestmem.check.strategies.strategy import SEEN, Start

MAX_STATES = 2_000_000
_VERIFY_EVERY = 61
_NOBODY = 0xFF  # where the state says who may go on without a preemption
_BYTES_A_STATE = 49 + 28 + 16  # the digest, what is known of it, its places in the table
_BYTES_AN_EDGE = 200


class Open(NamedTuple):
    """A step that is still to be made: how to get there, the state before it and after how many choices that is, and
    which share of the whole search it stands for."""

    start: Start
    source: bytes
    source_at: int
    weight: float


ROOT = Open(Start(), b"", 0, 1.0)


class States:
    """Depth-first search with a visited set."""

    name = "states"

    def __init__(self, preemptions: int | None = None, max_states: int = MAX_STATES) -> None:
        self.preemptions = preemptions
        self.full = False
        self.max_states = max_states
        self.visited: dict[bytes, int] = {}  # digest -> preemptions that were left; unbounded: 0
        self.ready: dict[bytes, int] = {}  # digest -> a bit for each ready task; unbounded only
        self.edges: list[Edge] = []
        self.frontier: list[Open] = [ROOT]
        self.root = b""
        self._here = ROOT
        self._starts = 0
        self._done = 0.0

    @property
    def exhaustive(self) -> bool:
        return not self.full

    @property
    def graph(self) -> States:
        return self

    @property
    def fraction(self) -> float:
        return self._done

    @property
    def states(self) -> int:
        return len(self.visited)

    @property
    def memory_bytes(self) -> int:
        """What the visited set and the graph take, about."""
        table = sys.getsizeof(self.visited) + sys.getsizeof(self.ready)
        return table + len(self.visited) * _BYTES_A_STATE + len(self.edges) * _BYTES_AN_EDGE

    def start(self) -> Start | None:
        if self.full or not self.frontier:
            return None
        self._here = here = self.frontier.pop()
        self._starts += 1
        if here.source and self._starts % _VERIFY_EVERY == 0:
            digest = here.source if self.preemptions is None else here.source[:-1]
            return here.start._replace(checkpoint=(here.source_at, digest))
        return here.start

    def choose(self, run: Run, ready: Sequence[int]) -> int:
        digest = run.world.digest()
        left = 0
        if self.preemptions is not None:
            running = run.last if run.last in ready and is_preempted(run.tasks[run.last]) else _NOBODY
            digest += bytes((running,))
            left = self.preemptions - run.preemptions
        self._note_edge(run, digest)
        seen = self.visited.get(digest)
        if seen is None and len(self.visited) >= self.max_states:
            self.full = True
        if self.full or (seen is not None and seen >= left):
            self._done += self._here.weight
            return SEEN
        self.visited[digest] = left
        if self.preemptions is None:
            self.root = self.root or digest
            self.ready[digest] = sum(1 << number for number in ready)
        first, others, used = branches(run, ready, self.preemptions)
        weight = self._here.weight / (len(others) + 1)
        at = len(run.choices)
        made = bytes(run.choices)
        for number in others:
            self.frontier.append(Open(Start(made + bytes((number,)), used), digest, at, weight))
        self._here = Open(Start(), digest, at, weight)
        return first

    def fails(self, run: Run, step: str) -> bool:
        here = self._here._replace(weight=self._here.weight / 2)
        start = Start(bytes(run.choices) + bytes((FAIL,)), run.preemptions)
        self.frontier.append(here._replace(start=start))
        self._here = here
        return False

    def end(self, run: Run) -> bool:
        digest = run.world.digest()
        self._note_edge(run, digest)
        self.ready[digest] = 0
        self._done += self._here.weight
        new = digest not in self.visited
        self.visited[digest] = 0
        return new

    def close(self) -> None:
        """What was visited stays, for the reader."""

    def _note_edge(self, run: Run, digest: bytes) -> None:
        if self.preemptions is None and self._here.source:
            self.edges.append(Edge(self._here.source, bytes(run.choices[self._here.source_at :]), digest))
