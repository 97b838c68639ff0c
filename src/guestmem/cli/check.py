"""`guestmem check`: explore every interleaving of the scenarios, or hunt the mutants with them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from guestmem.check import mutants as mutant_files
from guestmem.check import report, story, witness
from guestmem.check.choices import Schedule, parse
from guestmem.check.cluster import DaskPool
from guestmem.check.explore import VIOLATED, Result
from guestmem.check.lifetimes import report as report_of_lifetimes
from guestmem.check.plan import Plan
from guestmem.check.pool import LocalPool, Pool
from guestmem.check.scenario import built_in, find
from guestmem.check.strategies.states import MAX_STATES
from guestmem.check.work import Hunted, Options, bounded, scenario_named, under

PASS, VIOLATION, NOTHING_RUN = 0, 1, 4


class Format(StrEnum):
    """Of the output."""

    text = "text"
    tap = "tap"
    json = "json"


class LifetimeName(StrEnum):
    """The values of arch.Lifetime."""

    binding = "binding"
    folio = "folio"
    vm = "vm"


class StrategyName(StrEnum):
    """The keys of STRATEGIES."""

    states = "states"
    dfs = "dfs"
    dpor = "dpor"
    random = "random"
    pct = "pct"
    portfolio = "portfolio"


def check(
    names: Annotated[
        list[str] | None, typer.Argument(help="Scenarios, or Python files with some; all without.")
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the scenarios and leave.")] = False,
    strategy: Annotated[StrategyName, typer.Option(help="In which order schedules are tried.")] = StrategyName.states,
    preemptions: Annotated[int | None, typer.Option(help="At most so many, in place of the scenario's bound.")] = None,
    failures: Annotated[int | None, typer.Option(help="At most so many steps fail, instead of the scenario's.")] = None,
    lifetime: Annotated[
        LifetimeName, typer.Option(help="How long pages stay the guest's; another policy than the usual.")
    ] = LifetimeName.binding,
    lifetimes: Annotated[
        bool, typer.Option("--lifetimes", help="Compare the policies of lifetime, as tables, and leave.")
    ] = False,
    seed: Annotated[int, typer.Option(help="For random strategies.")] = 0,
    executions: Annotated[int, typer.Option(help="Stop a scenario after so many.")] = 10_000_000,
    seconds: Annotated[float, typer.Option(help="Stop a scenario after so long.")] = 600.0,
    max_states: Annotated[int, typer.Option(help="Stop a scenario when so many states are kept.")] = MAX_STATES,
    mutants: Annotated[bool, typer.Option("--mutants", help="Hunt every mutant of the folder.")] = False,
    mutants_in: Annotated[Path, typer.Option(help="The folder of the mutants.")] = mutant_files.KNOWN_BUGS,
    mutant: Annotated[str, typer.Option(help="Check the product with this mutant in it: FILE.py:NAME.")] = "",
    schedule: Annotated[str, typer.Option(help="Replay one schedule of the one scenario that is named.")] = "",
    trace: Annotated[
        Path | None, typer.Option(help="Write the witness: Perfetto, and FILE.json with its steps.")
    ] = None,
    confirm: Annotated[
        bool, typer.Option("--confirm", help="Replay the witness with guests on the Unicorn CPU.")
    ] = False,
    jobs: Annotated[int, typer.Option(help="Processes of this machine.")] = 1,
    cluster: Annotated[str, typer.Option(help="Address of a Dask scheduler: tcp://HOST:PORT.")] = "",
    checkpoint: Annotated[
        Path | None, typer.Option(help="With --jobs or --cluster: save, and go on from here.")
    ] = None,
    format_: Annotated[Format, typer.Option("--format", help="Of what is written to the output.")] = Format.text,
) -> None:
    """Explore every interleaving within each scenario's bound. Exit 0: no violation; 1: a violation; 4: nothing run."""
    if lifetimes:
        typer.echo(report_of_lifetimes())
        return
    policy = "" if lifetime is LifetimeName.binding else lifetime.value
    options = Options(strategy.value, preemptions, failures, seed, executions, seconds, max_states, policy)
    try:
        wanted = _scenarios(names or [])
        if mutant:
            mutant_files.find(mutant)
        hunted = _mutants(mutants_in) if mutants else []
    except (LookupError, OSError, SyntaxError) as error:
        _nothing(str(error))
    if list_:
        for name in wanted:
            typer.echo(f"{scenario_named(name).name:<32} {scenario_named(name).summary}")
        return
    show = Show(format_.value, mutant, trace, confirm, options)
    if schedule:
        raise typer.Exit(_replay(wanted, schedule, show))
    plan = Plan([] if mutants else wanted, options, mutant=mutant, mutants=hunted, hunting=wanted)
    if not plan.total:
        _nothing("nothing to run")
    raise typer.Exit(_run(plan, show, jobs, cluster, checkpoint))


def _scenarios(names: list[str]) -> list[str]:
    """What `work.scenario_named` understands, for each scenario that is asked for. Raises: LookupError, OSError."""
    if not names:
        return list(built_in())
    found = []
    for name in names:
        for scenario in find(name):
            found.append(f"{Path(name).resolve()}::{scenario.name}" if name.endswith(".py") else name)
    return found


def _mutants(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise OSError(f"no folder {folder}: run in the repository, or name it with --mutants-in")
    return mutant_files.in_folder(folder)


def _nothing(why: str) -> NoReturn:
    typer.echo(why, err=True)
    raise typer.Exit(NOTHING_RUN)


def _run(plan: Plan, show: Show, jobs: int, cluster: str, checkpoint: Path | None) -> int:
    began = time.monotonic()
    with _bar(plan.total, show.format == "text") as bar:
        if cluster or jobs > 1 or checkpoint is not None:
            try:
                pool: Pool = DaskPool(cluster) if cluster else LocalPool(jobs)
            except (RuntimeError, OSError) as error:
                _nothing(str(error))
            try:
                plan.run_in(pool, lambda _, outcome: bar.done(outcome), bar.progress, checkpoint)
            except ValueError as error:
                _nothing(str(error))
            finally:
                pool.close()
        else:
            plan.run_here(lambda _, outcome: bar.done(outcome), bar.progress)
    results = [plan.results[name] for name in plan.scenarios]
    hunted = [plan.hunted[name] for name in plan.mutants]
    most = max((result.memory_bytes for result in results), default=0)
    show.end(results, hunted, time.monotonic() - began, most)
    broken = [(name, plan.results[name]) for name in plan.scenarios if plan.results[name].verdict == VIOLATED]
    for name, result in broken[:1]:
        show.witness(name, result)
    return VIOLATION if broken or not all(each.found and each.expected for each in hunted) else PASS


def _replay(wanted: list[str], token: str, show: Show) -> int:
    if len(wanted) != 1:
        _nothing("--schedule needs the name of one scenario")
    try:
        schedule = parse(token)
    except ValueError as error:
        _nothing(str(error))
    with under(show.mutant):
        result = witness.replay(bounded(scenario_named(wanted[0]), show.options), schedule)
    result.schedule = schedule
    if show.format != "text":
        show.end([result], [], result.seconds, 0)
    show.tell(wanted[0], schedule, result)
    return VIOLATION if result.verdict == VIOLATED else PASS


class Show:
    """What goes to the output, in one of the formats."""

    def __init__(self, form: str, mutant: str, trace: Path | None, confirm: bool, options: Options) -> None:
        self.format = form
        self.mutant = mutant
        self.trace = trace
        self.confirm = confirm
        self.options = options

    def end(self, results: list[Result], hunted: list[Hunted], seconds: float, bytes_most: int) -> None:
        if self.format == "json":
            typer.echo(report.as_json(results, hunted))
        elif self.format == "tap":
            typer.echo(report.as_tap(results, hunted))
        else:
            typer.echo(report.summary(results, hunted, seconds, bytes_most))

    def witness(self, name: str, result: Result) -> None:
        """The first violation: shrunk, told, and how to see it again."""
        if result.schedule is None:
            return
        if self.format == "text":
            typer.echo(f"\n{result.name}: {result.property} is broken; looking for the simplest schedule ...")
        with under(self.mutant):
            shrunk = witness.shrink(bounded(scenario_named(name), self.options), result)
        self.tell(name, shrunk, result)

    def tell(self, name: str, schedule: Schedule, result: Result) -> None:
        """The story of a schedule, its files, and the command that replays it."""
        scenario = bounded(scenario_named(name), self.options)
        with under(self.mutant):
            told = witness.tell(scenario, schedule)
        if self.format == "text":
            typer.echo(f"\n{story.text(told)}\n")
            if result.verdict == VIOLATED:
                typer.echo(f"again: {self._command(name, schedule)}")
        if self.trace is not None:
            steps = self.trace.with_suffix(".steps.json")
            self.trace.write_text(story.perfetto(told))
            steps.write_text(story.as_json(told))
            typer.echo(f"written: {self.trace} (for ui.perfetto.dev), {steps}", err=self.format != "text")
        if self.confirm:
            from guestmem.check.confirm import confirm

            with under(self.mutant):
                typer.echo(confirm(scenario, schedule, told), err=self.format != "text")

    def _command(self, name: str, schedule: Schedule) -> str:
        file, _, scenario = name.rpartition("::")
        parts = ["guestmem check", file or scenario, f"--schedule '{schedule.token()}'"]
        if self.mutant:
            parts.append(f"--mutant {self.mutant}")
        if self.options.lifetime:
            parts.append(f"--lifetime {self.options.lifetime}")
        if self.options.failures is not None:
            parts.append(f"--failures {self.options.failures}")
        return " ".join(parts)


class _Bar:
    """The progress bar on the terminal's error stream; finished lines go to the output above it."""

    def __init__(self, bar: Progress | None, total: int) -> None:
        self._bar = bar
        self._all = bar.add_task("all", total=total, rate="") if bar else None
        self._one = bar.add_task("", total=1.0, rate="", visible=False) if bar else None

    def done(self, outcome: Result | Hunted) -> None:
        if self._bar is not None and self._all is not None:
            self._bar.console.print(report.text_line(outcome), markup=False, highlight=False, soft_wrap=True)
            self._bar.advance(self._all)

    def progress(self, name: str, result: Result) -> None:
        """One scenario that takes longer: how far it is, if its strategy knows, and how fast."""
        if self._bar is not None and self._one is not None:
            rate = f"{result.executions:,} executions, {result.executions / max(result.seconds, 1e-9):,.0f}/s"
            self._bar.update(
                self._one, description=result.name, completed=result.fraction or 0.0, rate=rate, visible=True
            )


@contextmanager
def _bar(total: int, wanted: bool) -> Iterator[_Bar]:
    if not wanted:
        yield _Bar(None, total)
        return
    columns = (
        TextColumn("{task.description:<32}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(soft_wrap=True), transient=True) as bar:
        yield _Bar(bar, total)
