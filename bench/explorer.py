"""The explorer on the reference scenario, three tasks of ten points, beside explorers from PyPI and beside greenlets.

Stateless search is how many complete executions a second one core makes, each from the start. frontrun (threads, or
asyncio tasks) and detangle (asyncio on a loop of its own) run the same program; greenlets have the same search loop as
the prototype that generators were chosen by. Pruned search is the scenario of 16 cells to its end. The last rows are
what a machine costs, which is what a product's scenario pays in place of a list of numbers.

The peers are not dependencies: `pip install frontrun detangle greenlet`. A peer that is missing is left out.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import io
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.harness import Row, report
from guestmem.check.explore import Limits, explore
from guestmem.check.reference import reference
from guestmem.check.scenario import built_in
from guestmem.check.strategies.dfs import Dfs
from guestmem.check.strategies.states import States

TASKS, POINTS, CELLS = 3, 10, 4
ROUNDS = 5


def run() -> None:
    """Print both tables."""
    ours = _best(lambda: _stateless(20_000))
    rows = [Row("stateless search, 3 tasks x 10 points", f"{ours:,.0f} executions/s", "", None)]
    for name, peer in PEERS.items():
        try:
            theirs = _best(peer, rounds=3)
        except ImportError as error:
            rows.append(Row(f"  beside {name}", "", f"not installed: {error.name}", None))
            continue
        rows.append(Row(f"  beside {name}", "", f"{theirs:,.0f} executions/s", theirs / ours))
    report("explorer: stateless search", "peer", rows)
    report("explorer: pruned search", "", [*_pruned(), *_product()])


def _stateless(executions: int) -> float:
    began = time.perf_counter()
    explore(reference(TASKS, POINTS, CELLS), Dfs(), Limits(executions=executions))
    return executions / (time.perf_counter() - began)


def _pruned() -> list[Row]:
    results = [explore(reference(TASKS, POINTS, 16), States()) for _ in range(ROUNDS)]
    best = min(results, key=lambda result: result.seconds)
    how = f"{best.seconds:.3f} s ({best.states:,} states, {best.executions:,} executions, {best.verdict})"
    return [Row("3 tasks x 10 points on 16 cells, to the end", how, "", None)]


def _product() -> list[Row]:
    rows = []
    for name in ("convert_against_guest", "punch_against_guest_and_host"):
        result = explore(built_in()[name], States())
        rate = result.executions / result.seconds
        how = f"{result.seconds:.2f} s ({result.states:,} states, {rate:,.0f} executions/s, {result.verdict})"
        rows.append(Row(name, how, "", None))
    return rows


def _best(measure: Callable[[], float], rounds: int = ROUNDS) -> float:
    """The fastest of some turns: what the code costs when nobody else has the core."""
    return max(measure() for _ in range(rounds))


# Peers


async def _task(cells: list[int], number: int, pause: Callable[[], Any]) -> None:
    for point in range(POINTS):
        await pause()
        if not point & 1:
            cell = (number * 7 + point * 3) % CELLS
            cells[cell] = cells[cell] * 3 + number + 1


def _detangle() -> float:
    detangle = importlib.import_module("detangle")
    strategies = detangle.DFS(max_delays=2)
    runs = 300

    async def scenario() -> None:
        cells = [0] * CELLS
        await asyncio.gather(*(_task(cells, number, lambda: asyncio.sleep(0)) for number in range(TASKS)))

    began = time.perf_counter()
    done = detangle.explore(scenario, runs=runs, strategy=strategies, database=False, shrink=False)
    return float(done.runs) / (time.perf_counter() - began)


def _frontrun_threads() -> float:
    """In a process of its own, under the command that patches threads for it."""
    importlib.import_module("frontrun")
    command = Path(sys.executable).with_name("frontrun")
    code = "from bench.explorer import frontrun_threads; print(frontrun_threads())"
    done = subprocess.run([command, sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def frontrun_threads() -> float:
    """Executions a second; only under the frontrun command."""
    frontrun = importlib.import_module("frontrun")

    def worker(number: int) -> Callable[[list[int]], None]:
        def add(cells: list[int]) -> None:
            for point in range(POINTS):
                if not point & 1:
                    cell = (number * 7 + point * 3) % CELLS
                    cells[cell] = cells[cell] * 3 + number + 1

        return add

    began = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        done = frontrun.explore_random(
            setup=lambda: [0] * CELLS,
            threads=[worker(number) for number in range(TASKS)],
            invariant=lambda cells: True,
            max_attempts=30,
            max_ops=TASKS * POINTS,
        )
    return float(done.num_explored) / (time.perf_counter() - began)


def _frontrun_async() -> float:
    frontrun = importlib.import_module("frontrun")

    def worker(number: int) -> Callable[[list[int]], Any]:
        return lambda cells: _task(cells, number, lambda: asyncio.sleep(0))

    async def search() -> Any:
        return await frontrun.explore_async_random(
            setup=lambda: [0] * CELLS,
            tasks=[worker(number) for number in range(TASKS)],
            invariant=lambda cells: True,
            max_attempts=100,
            max_ops=TASKS * (POINTS + 1),
        )

    began = time.perf_counter()
    done = asyncio.run(search())
    return float(done.num_explored) / (time.perf_counter() - began)


def _greenlets() -> float:
    greenlet = importlib.import_module("greenlet")
    limit = 3_000
    prefix: list[int] = []
    began = time.perf_counter()
    for _ in range(limit):
        trace = _run_greenlets(greenlet, prefix)
        while trace and trace[-1][1].index(trace[-1][0]) + 1 == len(trace[-1][1]):
            trace.pop()
        choice, ready = trace[-1]
        prefix = [each for each, _ in trace[:-1]] + [ready[ready.index(choice) + 1]]
    return limit / (time.perf_counter() - began)


def _run_greenlets(greenlet: Any, prefix: list[int]) -> list[tuple[int, tuple[int, ...]]]:
    """One execution: the choices of `prefix`, then always the first; each choice with those there were."""
    cells = [0] * CELLS
    main = greenlet.getcurrent()

    def body(number: int) -> None:
        for point in range(POINTS):
            main.switch()
            if not point & 1:
                cell = (number * 7 + point * 3) % CELLS
                cells[cell] = cells[cell] * 3 + number + 1

    tasks = [greenlet.greenlet(body) for _ in range(TASKS)]
    for number, task in enumerate(tasks):
        task.switch(number)
    ready = list(range(TASKS))
    trace: list[tuple[int, tuple[int, ...]]] = []
    while ready:
        choice = prefix[len(trace)] if len(trace) < len(prefix) else ready[0]
        trace.append((choice, tuple(ready)))
        tasks[choice].switch()
        if tasks[choice].dead:
            ready.remove(choice)
    return trace


PEERS: dict[str, Callable[[], float]] = {
    "frontrun 0.7, threads": _frontrun_threads,
    "frontrun 0.7, asyncio": _frontrun_async,
    "detangle 0.1, asyncio": _detangle,
    "greenlets": _greenlets,
}
