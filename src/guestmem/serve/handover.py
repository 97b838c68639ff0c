"""Hand-over: a server ends, its preserved sessions go on in the next one. And the directory in which they meet.

The directory has `lock`, held by the server that runs, with its process number; `state`, the records; and `keeper`, the
socket of the process that holds the memory. `state` and the keeper are let go of when the next server has taken all of
it over, and not before.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
from pathlib import Path

from guestmem.serve import keeper, state_file
from guestmem.serve.liveupdate import Session, Stored
from guestmem.serve.server import Server
from guestmem.serve.state_file import Damaged, Entry, State

_PATIENCE_S = 60


class InUse(Exception):
    """Another server runs on the directory; its process number."""


class Directory:
    """The state directory of one server after another."""

    def __init__(self, path: Path, take_over: bool = False) -> None:
        """Raises: InUse, unless `take_over`, which tells the other to end and waits; OSError."""
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path = path
        self._lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            other = int(os.pread(self._lock, 32, 0) or b"0")
            if not take_over:
                os.close(self._lock)
                raise InUse(other) from None
            _end(other)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, str(os.getpid()).encode(), 0)

    def load(self, server: Server) -> int:
        """Take over what a server before has left; how many sessions. All of it or, with `Damaged`, nothing: then it is
        all where it was.

        Raises: Damaged; OSError.
        """
        kept = keeper.fetch(self.path)
        try:
            sessions = self._sessions_of(server, kept.memfds)
        except Damaged:
            kept.close()
            raise
        for name, stored in sessions.items():
            server.sessions.adopt(name, stored)
        (self.path / "state").unlink(missing_ok=True)
        if sessions:
            kept.release()
        return len(sessions)

    def _sessions_of(self, server: Server, memfds: dict[str, int]) -> dict[str, dict[int, Stored]]:
        """The state, the memory and this server belong together. Raises: Damaged."""
        path = self.path / "state"
        try:
            state = state_file.read(path)
        except FileNotFoundError:
            if memfds:
                raise Damaged(f"{path}: not there, though memory was kept") from None
            return {}
        if state.level != server.host.level.name:
            raise Damaged(f"{path}: of ABI level {state.level}, and this server has {server.host.level.name}")
        for name, size in state.memfds.items():
            if name not in memfds:
                raise Damaged(f"{path}: memory {name} was not kept")
            there = os.fstat(memfds[name]).st_size
            if there != size:
                raise Damaged(f"{path}: memory {name} has {there} bytes where there should be {size}")
        return {
            name: {entry.token: Stored(entry.record, memfds.get(entry.memfd)) for entry in entries}
            for name, entries in state.sessions.items()
        }

    def save(self, server: Server) -> int:
        """Stop the server and hand every session over; how many. If there are any its clients are ended first: they
        could reach private memory, which nobody guards meanwhile. Raises: OSError."""
        sessions: dict[str, list[Entry]] = {}
        memfds: dict[str, int] = {}
        leaving = _leaving(server)
        if leaving:
            server.kill_clients()
        server.stop()
        for session in leaving:
            entries = sessions[session.name] = []
            for token, (record, fd) in session.records().items():
                name = ""
                if fd is not None:
                    name = keeper.name_of(len(memfds))
                    memfds[name] = fd
                entries.append(Entry(token, record, name))
        if sessions:
            keeper.keep(self.path, memfds)
            state_file.write(self.path / "state", State(server.host.level.name, sessions))
            for session in leaving:
                session.handed_over = True
        return len(sessions)

    def close(self) -> None:
        """Let another server have it."""
        os.close(self._lock)


def _leaving(server: Server) -> list[Session]:
    """What was preserved here, and what came and of which nobody has retrieved a VM yet."""
    untouched = [session for session in server.sessions.incoming.values() if session.stored and not session.vms]
    return [*server.sessions.outgoing.values(), *untouched]


def _end(pid: int) -> None:
    """Tell a server to end, and wait until it has."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        signal.pidfd_send_signal(process, signal.SIGTERM)
        select.select([process], [], [], _PATIENCE_S)
    finally:
        os.close(process)
