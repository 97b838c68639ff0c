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

from guestmem.check.choices import FAIL
from guestmem.check.liveness import Edge
from guestmem.check.run import Run, is_preempted
from guestmem.check.strategies.strategy import STOP, Start
from guestmem.sched.fingerprint import DIGEST_SIZE

MAX_STATES = 2_000_000
_VERIFY_EVERY = 61
_NOBODY = 0xFF  # where the state says who may go on without a preemption
_BYTES_A_STATE = 49 + 28 + 16  # the digest, what is known of it, its places in the table
_BYTES_AN_EDGE = 200


class States:
    """Depth-first search with a visited set."""

    name = "states"
    exhaustive = True

    def __init__(self, preemptions: int | None = None, depth: int | None = None, max_states: int = MAX_STATES) -> None:
        self.preemptions = preemptions
        self.depth = depth
        self.cut = False
        self.full = False
        self.max_states = max_states
        self.visited: dict[bytes, int] = {}  # digest -> preemptions that were left; unbounded: 0
        self.ready: dict[bytes, int] = {}  # digest -> a bit for each ready task; unbounded only
        self.edges: list[Edge] = []
        self.frontier: list[tuple[Start, bytes, int]] = [(Start(), b"", 0)]  # start, state before its last step, where
        self.root = b""
        self._source = b""
        self._source_at = 0
        self._starts = 0

    def start(self) -> Start | None:
        if self.full or not self.frontier:
            return None
        start, self._source, self._source_at = self.frontier.pop()
        self._starts += 1
        if self._source and self._starts % _VERIFY_EVERY == 0:
            return start._replace(checkpoint=(self._source_at, self._source[:DIGEST_SIZE]))
        return start

    def choose(self, run: Run, ready: Sequence[int]) -> int:
        if self.depth is not None and len(run.choices) >= self.depth:
            self.cut = True
            return STOP
        digest = run.world.digest()
        bounded = self.preemptions is not None
        left = 0
        if bounded:
            running = run.last if run.last in ready and is_preempted(run.tasks[run.last]) else _NOBODY
            digest += bytes((running,))
            left = self.preemptions - run.preemptions  # type: ignore[operator]
        elif self._source:
            self.edges.append(Edge(self._source, bytes(run.choices[self._source_at :]), digest))
        seen = self.visited.get(digest)
        if seen is not None and seen >= left:
            return STOP
        if seen is None and len(self.visited) >= self.max_states:
            self.full = True
            return STOP
        self.visited[digest] = left
        if not bounded:
            self.root = self.root or digest
            self.ready[digest] = sum(1 << number for number in ready)
        self._source, self._source_at = digest, len(run.choices)
        return self._branch(run, ready)

    def fails(self, run: Run, step: str) -> bool:
        start = Start(bytes(run.choices) + bytes((FAIL,)), run.preemptions)
        self.frontier.append((start, self._source, self._source_at))
        return False

    def end(self, run: Run) -> bool:
        digest = run.world.digest()
        if self.preemptions is None and self._source:
            self.edges.append(Edge(self._source, bytes(run.choices[self._source_at :]), digest))
            self.ready[digest] = 0
        new = digest not in self.visited
        self.visited[digest] = 0
        return new

    @property
    def states(self) -> int:
        return len(self.visited)

    @property
    def memory_bytes(self) -> int:
        """What the visited set and the graph take, about."""
        table = sys.getsizeof(self.visited) + sys.getsizeof(self.ready)
        return table + len(self.visited) * _BYTES_A_STATE + len(self.edges) * _BYTES_AN_EDGE

    def _branch(self, run: Run, ready: Sequence[int]) -> int:
        last, used = run.last, run.preemptions
        first, cost = ready[0], 0
        if last in ready:
            first = last
            cost = 1 if is_preempted(run.tasks[last]) else 0
        if self.preemptions is None or used + cost <= self.preemptions:
            made = bytes(run.choices)
            for number in reversed(ready):
                if number != first:
                    start = Start(made + bytes((number,)), used + cost)
                    self.frontier.append((start, self._source, self._source_at))
        return first
