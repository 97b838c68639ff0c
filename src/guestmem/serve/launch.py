"""Run a client program under the server, and end as it ended."""

from __future__ import annotations

import enum
import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from guestmem.host import Host
from guestmem.memory import HugePolicy
from guestmem.memory.pages import ORDER_1G, ORDER_2M
from guestmem.native import shim_path
from guestmem.serve.report import Report
from guestmem.serve.requests import HANDLERS
from guestmem.serve.seccomp import run as traced
from guestmem.serve.seccomp.elf import is_static
from guestmem.serve.server import Server
from guestmem.uapi.levels import AbiLevel

SOCKET_VARIABLE = "GUESTMEM_SOCKET"
_FORWARDED = (signal.SIGTERM, signal.SIGHUP)


class Transport(enum.Enum):
    """How a client's calls come here."""

    AUTO = "auto"
    """PRELOAD for a dynamic program, SECCOMP for a static one."""
    PRELOAD = "preload"
    SECCOMP = "seccomp"


class NoShim(Exception):
    """The native part was not built: no compiler was there at installation."""


_MEMORY = 1 << 52
_HUGE_PAGES = {ORDER_2M: _MEMORY >> 2 + 21, ORDER_1G: _MEMORY >> 1 + 30}
"""A quarter of the memory and half of it. Counts only: what memory there is behind them is the machine's matter."""


def make_server(
    level: AbiLevel, huge_pages: Mapping[int, int] | None = None, huge_policy: HugePolicy | None = None
) -> Server:
    """A host of its own with a server for it. Nothing is scarce on it: the memory is the machine's own, and the VM
    types that there are need no ASID. `huge_pages`: how many of each order there are, if they are to be scarce."""
    host = Host(
        level=level,
        memory=_MEMORY,
        identities=1 << 31,
        hugepages=_HUGE_PAGES if huge_pages is None else huge_pages,
        huge_policy=huge_policy or HugePolicy(),
        clients=True,
    )
    return Server(host, HANDLERS, Report())


def run(server: Server, command: Sequence[str], transport: Transport = Transport.AUTO) -> int:
    """Run `command`, the path of a program and its arguments, and serve it, and what it starts, until all have ended.
    The wait status as subprocess has it: an exit code, or minus the signal that killed it.

    Raises: NoShim; CannotTrace; OSError if the command cannot be started.
    """
    static = is_static(Path(command[0]))
    if transport is Transport.SECCOMP or (static and transport is Transport.AUTO):
        program = "a static program, into which nothing can be preloaded" if static else "a dynamic program"
        server.report.notes.append(f"{command[0]} is {program}: its calls came by seccomp notification and ptrace")
        return traced.run(server, command)
    shim = shim_path()
    if shim is None:
        raise NoShim
    with tempfile.TemporaryDirectory(prefix="guestmem-") as directory:
        path = os.path.join(directory, "socket")
        server.listen(path)
        client = _start(command, path, shim)
        try:
            return _serve(server, client)
        finally:
            server.close()


def connect(command: Sequence[str], socket_path: Path) -> None:
    """Become `command`, a dynamic program, as a client of a server that runs already.

    Raises: NoShim; OSError if the command cannot be started or nobody serves at the path.
    """
    shim = shim_path()
    if shim is None:
        raise NoShim
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.connect(str(socket_path))
    os.execve(command[0], list(command), _environment(str(socket_path.absolute()), shim))


def serve_until_told(server: Server) -> None:
    """Serve whoever comes until SIGTERM or SIGINT."""
    told = False
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def end(number: int, _: object) -> None:
        nonlocal told
        told = True

    former = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    wakeup = signal.set_wakeup_fd(writer.fileno())
    server.watch(reader.fileno(), lambda: _drain(reader))
    try:
        server.run(until=lambda: told)
    finally:
        signal.set_wakeup_fd(wakeup)
        server.unwatch(reader.fileno())
        reader.close()
        writer.close()
        for number, handler in former.items():
            signal.signal(number, handler)


def _drain(reader: socket.socket) -> None:
    reader.recv(64)


def _start(command: Sequence[str], socket_path: str, shim: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(list(command), env=_environment(socket_path, shim))


def _environment(socket_path: str, shim: Path) -> dict[str, str]:
    environment = dict(os.environ)
    preloaded = [str(shim), *filter(None, [environment.get("LD_PRELOAD")])]
    environment["LD_PRELOAD"] = ":".join(preloaded)
    environment[SOCKET_VARIABLE] = socket_path
    return environment


def _serve(server: Server, client: subprocess.Popen[bytes]) -> int:
    """The client has the terminal: an interrupt from the keyboard is its business. A termination is passed on, and then
    what the client has started and left is not waited for."""
    pidfd = os.pidfd_open(client.pid)
    ended = told_to_end = False

    def forward(number: int, _: object) -> None:
        nonlocal told_to_end
        told_to_end = True
        client.send_signal(number)

    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    others = {number: signal.signal(number, forward) for number in _FORWARDED}

    def on_end() -> None:
        nonlocal ended
        ended = True
        server.unwatch(pidfd)

    server.watch(pidfd, on_end)
    try:
        server.run(until=lambda: ended and (told_to_end or not server.busy))
        return client.wait()
    finally:
        os.close(pidfd)
        signal.signal(signal.SIGINT, former)
        for number, handler in others.items():
            signal.signal(number, handler)
        if client.poll() is None:
            client.kill()
            client.wait()
