"""`guestmem run`: a KVM program, unchanged, on a software /dev/kvm."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, TextIO

import typer

from guestmem.cli.huge_pages import page_counts, policy_of, shortages
from guestmem.cli.run_report import print_report
from guestmem.memory.host_pages import more_host_pages
from guestmem.serve import launch
from guestmem.serve.seccomp.elf import is_static
from guestmem.serve.seccomp.start import CannotTrace
from guestmem.serve.server import Server
from guestmem.serve.wire import CpuMode
from guestmem.trace import Refusal, json_writer, text_writer
from guestmem.uapi.levels import LEVELS

_NOT_FOUND, _NOT_EXECUTABLE, _CANNOT = 127, 126, 125
"""Exit codes of env(1) and timeout(1) for what went wrong before the command ran."""


_NO_SHIM = "no shim: guestmem was installed without a C compiler, see guestmem doctor"


def run(
    command: Annotated[list[str], typer.Argument(help="The program and its arguments, after --.")],
    abi: Annotated[str, typer.Option(help=f"ABI level: {', '.join(LEVELS)}.")] = "future",
    explain: Annotated[bool, typer.Option("--explain", help="After the run, say what was called and refused.")] = False,
    trace: Annotated[Path | None, typer.Option(help="Write every event to this file.")] = None,
    transport: Annotated[
        launch.Transport, typer.Option(help="How its calls come here; auto is seccomp for static programs.")
    ] = launch.Transport.AUTO,
    hugepages: Annotated[
        str | None, typer.Option(metavar="2M=N,1G=N", help="How many huge pages there are; as many as you like.")
    ] = None,
    huge_policy: Annotated[
        str, typer.Option(metavar="lazy|whole,atomic|stepwise", help="How huge pages are split and converted.")
    ] = "lazy,atomic",
    reserve_host_pages: Annotated[
        str | None,
        typer.Option(metavar="2M=N,1G=N", help="Have this machine set aside huge pages meanwhile, as root."),
    ] = None,
    serial: Annotated[
        bool, typer.Option("--serial", help="One vCPU of a process at a time, in slices of a millisecond.")
    ] = False,
    connect: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Run as a client of the guestmem serve at this socket.")
    ] = None,
) -> None:
    """Run a KVM program on a software /dev/kvm with guest_memfd as of an ABI level.

    Its output and exit code are passed through. A program that a signal killed kills this command in the same way.
    """
    level = LEVELS.get(abi)
    if level is None:
        raise _failure(f"no ABI level {abi!r}; there are {', '.join(LEVELS)}")
    path = shutil.which(command[0])
    if path is None:
        raise _failure(f"{command[0]}: not found", _NOT_FOUND)
    if connect is not None:
        _connect([path, *command[1:]], connect)
    try:
        counts = None if hugepages is None else page_counts(hugepages)
        policy = policy_of(huge_policy)
        reserved = page_counts(reserve_host_pages or "")
    except ValueError as error:
        raise _failure(str(error)) from None
    with ExitStack() as stack:
        try:
            got = stack.enter_context(more_host_pages(reserved))
        except OSError as error:
            raise _failure(f"huge pages of this machine: {error.strerror}") from None
        try:
            server = launch.make_server(level, counts, policy)
        except Refusal as refusal:
            raise _failure(f"so many huge pages cannot be: {refusal}") from None
        server.report.notes += shortages(reserved, got)
        if serial:
            server.cpu_mode = CpuMode.SERIAL
        if trace is not None:
            _trace(server, stack.enter_context(trace.open("w")), json=trace.suffix.startswith(".json"))
        status = _launch(server, [path, *command[1:]], transport)
    if explain or server.report.bugs:
        print_report(server.report)
    _end_as(status)


def _launch(server: Server, command: list[str], transport: launch.Transport) -> int:
    """Run the command to its end; its exit code, or minus the signal that killed it."""
    try:
        return launch.run(server, command, transport)
    except CannotTrace as error:
        raise _failure(str(error)) from None
    except launch.NoShim:
        raise _failure(_NO_SHIM) from None
    except OSError as error:
        raise _failure(f"{command[0]}: {error.strerror}", _NOT_EXECUTABLE) from error


def _connect(command: list[str], socket: Path) -> None:
    """Become the command; what is for a server of our own means nothing then."""
    if is_static(Path(command[0])):
        raise _failure(f"{command[0]}: a static program, which only a server of its own can serve")
    try:
        launch.connect(command, socket)
    except launch.NoShim:
        raise _failure(_NO_SHIM) from None
    except OSError as error:
        raise _failure(f"{socket}: {error.strerror}") from None


def _trace(server: Server, out: TextIO, json: bool) -> None:
    writer = json_writer if json else text_writer
    scheduler = server.scheduler
    server.host.tracer.listen(writer(out, lambda: scheduler.current.name if scheduler.current else "server"))


def _failure(message: str, code: int = _CANNOT) -> typer.Exit:
    typer.echo(f"guestmem run: {message}", err=True)
    return typer.Exit(code)


def _end_as(status: int) -> None:
    """Exit with the client's code, or by the signal that killed it."""
    sys.stdout.flush()
    if status < 0:
        number = -status
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        status = 128 + number  # a signal that does not kill us
    raise typer.Exit(status)
