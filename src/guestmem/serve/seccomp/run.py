"""Serve a program that was started under a seccomp filter, until it and all that it started have ended."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from typing import TYPE_CHECKING

from guestmem.serve.seccomp.start import start
from guestmem.serve.seccomp.supervisor import Supervisor

if TYPE_CHECKING:
    from guestmem.serve.server import Server

_FORWARDED = (signal.SIGTERM, signal.SIGHUP)


def run(server: Server, command: Sequence[str]) -> int:
    """How it ended, as subprocess has it. Closes the server.

    Raises: CannotTrace; OSError if the program cannot be started.
    """
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        started = start(command)
        supervisor = Supervisor(server, started)
        try:
            started.go()
            _serve(server, supervisor)
        finally:
            supervisor.kill()
            supervisor.close()
    finally:
        server.close()
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    if error := started.exec_error():
        raise OSError(error, os.strerror(error), command[0])
    assert supervisor.status is not None
    return supervisor.status


def _serve(server: Server, supervisor: Supervisor) -> None:
    """The program has the terminal: an interrupt from the keyboard is its business. A termination is passed on, and
    then what the program has started and left is not waited for."""
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    told_to_end = False

    def forward(number: int, _: object) -> None:
        nonlocal told_to_end
        told_to_end = True
        if supervisor.status is None:
            os.kill(supervisor.pid, number)

    others = {number: signal.signal(number, forward) for number in _FORWARDED}
    try:
        server.run(until=lambda: supervisor.ended or (told_to_end and supervisor.status is not None))
    finally:
        for number, handler in {signal.SIGINT: former, **others}.items():
            signal.signal(number, handler)
