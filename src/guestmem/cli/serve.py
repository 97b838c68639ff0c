"""`guestmem serve`: a software /dev/kvm that outlives its clients, and itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from guestmem.cli.levels import ABI_HELP, find_level
from guestmem.serve import launch
from guestmem.serve.handover import Directory, InUse
from guestmem.serve.state_file import Damaged
from guestmem.trace import Refusal

_CANNOT, _REFUSED = 125, 3


def serve(
    socket: Annotated[Path, typer.Option(help="Where clients come in: guestmem run --connect PATH.")],
    state: Annotated[
        Path | None, typer.Option(help="Directory through which what is preserved goes to the next server.")
    ] = None,
    abi: Annotated[str, typer.Option(help=ABI_HELP)] = "future",
    take_over: Annotated[
        bool, typer.Option("--take-over", help="If a server runs on the state directory, have it end first.")
    ] = False,
) -> None:
    """Serve clients until SIGTERM or SIGINT.

    With --state, live update sessions that are open then are handed over: the next server on the directory has the
    memory and the state of their files. What it finds damaged, or of another version, it refuses as a whole and leaves
    where it is (exit code 3).
    """
    try:
        level = find_level(abi)
    except Refusal as refusal:
        raise _failure(f"--abi: {refusal}") from None
    if take_over and state is None:
        raise _failure("--take-over needs --state")
    try:
        directory = Directory(state, take_over) if state is not None else None
        server = launch.make_server(level)
        found = directory.load(server) if directory is not None else 0
        server.listen(str(socket), replace=True)
    except InUse as other:
        raise _failure(f"{state}: in use by process {other}; --take-over has it end") from None
    except Damaged as reason:
        raise _failure(f"refused, and left where it is: {reason}", _REFUSED) from None
    except OSError as error:
        raise _failure(str(error)) from None
    typer.echo(f"serving on {socket}" + (f", {found} sessions from before" if found else ""))
    launch.serve_until_told(server)
    handed = directory.save(server) if directory is not None else 0
    server.close()
    socket.unlink(missing_ok=True)
    if directory is not None:
        directory.close()
    for bug in server.report.bugs:
        typer.echo(f"guestmem serve: {bug}", err=True)
    if handed:
        typer.echo(f"handed over: {handed} sessions")


def _failure(message: str, code: int = _CANNOT) -> typer.Exit:
    typer.echo(f"guestmem serve: {message}", err=True)
    return typer.Exit(code)
