"""`guestmem simulate`: what page sizes and split policies would have made of a trace."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from guestmem.memory import Conversion, Split
from guestmem.simulate import costs as cost_model
from guestmem.simulate.generators import Generated
from guestmem.simulate.plot import NoPlot, check_plot, plot
from guestmem.simulate.row import Combination, Result, combinations
from guestmem.simulate.run import RowLost, Task, run_rows
from guestmem.simulate.sizes import ORDER_OF, parse_size
from guestmem.simulate.source import Source, Survey, survey
from guestmem.simulate.table import tables
from guestmem.simulate.trace_file import TraceFile
from guestmem.trace import Refusal

PASS, PROBLEMS, BAD_INPUT = 0, 1, 2
_WIDTH = 150
T = TypeVar("T")


class Format(StrEnum):
    """Of the output."""

    text = "text"
    json = "json"


class Kind(StrEnum):
    """The keys of GENERATORS."""

    swiotlb = "swiotlb"
    balloon = "balloon"
    boot = "boot"
    random = "random"


def simulate(
    trace: Annotated[Path | None, typer.Argument(help="A trace that guestmem run --trace FILE.json recorded.")] = None,
    page_size: Annotated[str, typer.Option(help="Some of 4k, 2m, 1g.")] = "4k,2m,1g",
    policy: Annotated[
        str, typer.Option(help="Some of lazy, whole (splitting) and atomic, stepwise (conversion).")
    ] = "lazy,whole,atomic",
    generate: Annotated[Kind | None, typer.Option(help="Make a trace instead of reading one.")] = None,
    memory: Annotated[str, typer.Option(help="Of the guest whose trace is made.")] = "1T",
    seed: Annotated[int, typer.Option(help="The same seed makes the same trace.")] = 1,
    count: Annotated[int, typer.Option(min=0, help="Of what the kind does most.")] = 100_000,
    output: Annotated[Path | None, typer.Option(help="Only write the trace that is made to this file.")] = None,
    spare: Annotated[
        str | None,
        typer.Option(help="Memory that is free for the struct pages of split huge pages; all of it without."),
    ] = None,
    costs: Annotated[Path | None, typer.Option(help="An edited cost model, as --show-costs prints it.")] = None,
    show_costs: Annotated[bool, typer.Option("--show-costs", help="Print the cost model and its sources.")] = False,
    samples: Annotated[int, typer.Option(min=1, max=100_000, help="Points over the trace in JSON and plot.")] = 100,
    format: Annotated[Format, typer.Option(help="Of the output.")] = Format.text,
    plot_to: Annotated[Path | None, typer.Option("--plot", help="Draw to this file, .png or .svg.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Hold the end against the start; exit code 1.")] = False,
    jobs: Annotated[int, typer.Option(min=1, max=256, help="Rows at a time.")] = 1,
) -> None:
    """Replay conversions, faults and holes against page sizes and split policies; what it costs and what stays huge.

    Each page size with each policy is a row. Exit code 2 is bad input, of which nothing was replayed.
    """
    with _errors():
        model = cost_model.load(costs) if costs else cost_model.default_costs()
        if show_costs:
            typer.echo(model.text())
            return
        source = _source(trace, generate, memory, seed, count)
        if output is not None:
            _write(source, generate, output)
            return
        combined = _combinations(page_size, policy)
        spare_bytes = _size(spare, "--spare") if spare is not None else None
        if plot_to is not None:
            check_plot(plot_to)
        surveyed = survey(source)
        tasks = [Task(source, surveyed, each, model, samples, spare_bytes, verify) for each in combined]
        with _bar(combined, surveyed) as progress:
            rows = run_rows(tasks, jobs, progress)
        result = Result(
            source.name,
            surveyed.events,
            model.tlb_entries,
            {name: cost.ns for name, cost in model.items.items()},
            rows,
        )
        _show(result, format)
        if plot_to is not None:
            plot(result, plot_to)
    raise typer.Exit(PROBLEMS if any(row.problems for row in rows) else PASS)


@contextmanager
def _errors() -> Iterator[None]:
    """What the caller did wrong, on one line."""
    try:
        yield
    except (Refusal, NoPlot, RowLost) as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))


def _fail(message: str) -> None:
    typer.echo(f"guestmem simulate: {message}", err=True)
    raise typer.Exit(BAD_INPUT)


def _source(trace: Path | None, kind: Kind | None, memory: str, seed: int, count: int) -> Source:
    if (trace is None) == (kind is None):
        raise typer.BadParameter("give a trace, or --generate a kind of one")
    if kind is not None:
        return Generated(kind.value, _size(memory, "--memory"), seed, count)
    assert trace is not None
    if not trace.is_file():
        raise typer.BadParameter(f"{trace} is no file; a trace is read several times, so it cannot be a pipe")
    return TraceFile(trace)


def _combinations(page_size: str, policy: str) -> list[Combination]:
    orders = _chosen(page_size, ORDER_OF, "--page-size")
    words: dict[str, Split | Conversion] = {each.value: each for each in (*Split, *Conversion)}
    policies = _chosen(policy, words, "--policy")
    splits = [each for each in policies if isinstance(each, Split)] or [Split.LAZY]
    conversions = [each for each in policies if isinstance(each, Conversion)] or [Conversion.ATOMIC]
    return combinations(orders, splits, conversions)


def _chosen(text: str, words: dict[str, T], option: str) -> list[T]:
    """The values of a list of words, each once."""
    given = list(dict.fromkeys(word.strip().lower() for word in text.split(",")))
    unknown = [word for word in given if word not in words]
    if unknown:
        raise typer.BadParameter(f"{option}: no {', '.join(map(repr, unknown))}; there are {', '.join(words)}")
    return [words[word] for word in given]


def _size(text: str, option: str) -> int:
    size = parse_size(text)
    if size is None:
        raise typer.BadParameter(f"{option}: {text!r} is no size; write 64M, 16G, 1T")
    return size


def _write(source: Source, kind: Kind | None, output: Path) -> None:
    if kind is None:
        raise typer.BadParameter("--output is for a trace that is made, with --generate")
    events = source.events()
    encode = msgspec.json.Encoder().encode
    with output.open("wb") as out:
        written = 0
        for written, each in enumerate(events, 1):  # noqa: B007 - the count is used after the loop
            out.write(encode(msgspec.to_builtins(each) | {"task": kind.value}) + b"\n")
    typer.echo(f"written: {output}, {written:,} events")


def _show(result: Result, format: Format) -> None:
    if format is Format.json:
        typer.echo(msgspec.json.format(msgspec.json.encode(result), indent=1).decode())
        return
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH)
    console.print(f"{result.trace}: {result.events:,} events", markup=False)
    for table in tables(result):
        console.print()
        console.print(table)
    if rows := [row for row in result.rows if row.problems is not None]:
        console.print()
        for row in rows:
            console.print(f"{row.label}: {_verdict(row.problems or [])}", markup=False, soft_wrap=True)


def _verdict(problems: list[str]) -> str:
    return "; ".join(problems) or "ends as it began: every huge page is merged, every count is at its start"


@contextmanager
def _bar(rows: list[Combination], surveyed: Survey) -> Iterator[Callable[[int, int], None]]:
    """A line for each row that has begun, on a terminal's error stream."""
    columns = (
        TextColumn("{task.description:<22}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        lines = [bar.add_task(row.label, total=surveyed.events, visible=False) for row in rows]
        yield lambda number, done: bar.update(lines[number], completed=done, visible=True)
