"""All rows of an answer, each in a process of its own: so its resident memory is its own, and rows run side by side."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import NamedTuple

from guestmem.simulate.costs import Costs
from guestmem.simulate.replay import Replay
from guestmem.simulate.row import Combination, Row
from guestmem.simulate.source import Source, Survey

Progress = Callable[[int, int], None]
"""Told the number of a row and how many of its events are done."""


class Task(NamedTuple):
    """What a row is made from; can be pickled. `samples`, `spare` and `verify` are as for Replay."""

    source: Source
    survey: Survey
    combination: Combination
    costs: Costs
    samples: int
    spare: int | None
    verify: bool

    def replay(self, progress: Callable[[int], None]) -> Row:
        replay = Replay(
            self.source,
            self.survey,
            self.combination,
            self.costs,
            samples=self.samples,
            spare=self.spare,
            verify=self.verify,
        )
        return replay.run(progress)


class RowLost(RuntimeError):
    """The process of a row ended without an answer."""


def run_rows(tasks: Sequence[Task], jobs: int, progress: Progress) -> list[Row]:
    """The rows, in the order of `tasks`, `jobs` at a time. Raises: RowLost; what a replay raised."""
    context = multiprocessing.get_context("spawn")
    rows: dict[int, Row] = {}
    waiting = list(enumerate(tasks))
    running: dict[Connection, tuple[int, SpawnProcess]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                number, task = waiting.pop(0)
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(theirs, task), daemon=True)
                process.start()
                theirs.close()
                running[ours] = number, process
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)
                number, process = running[connection]
                said = _receive(connection, tasks[number])
                if isinstance(said, int):
                    progress(number, said)
                    continue
                del running[connection]
                process.join()
                connection.close()
                rows[number] = said
    finally:
        for connection, (_, process) in running.items():
            process.kill()
            process.join()
            connection.close()
    return [rows[number] for number in range(len(tasks))]


def _receive(connection: Connection, task: Task) -> int | Row:
    try:
        said = connection.recv()
    except EOFError:
        raise RowLost(f"{task.combination.label}: its process was killed; is there memory enough?") from None
    if isinstance(said, BaseException):
        raise said
    assert isinstance(said, int | Row)
    return said


def _work(connection: Connection, task: Task) -> None:
    """In the other process."""
    try:
        connection.send(task.replay(connection.send))
    except Exception as error:
        connection.send(error)
