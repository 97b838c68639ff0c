"""Who holds the memory of preserved files while no server runs: a small process, or systemd's store of descriptors.

The keeper is a fork of the server that ends. It waits at a socket in the state directory, gives a copy of every
descriptor to whoever connects, and goes when it is told that they have arrived. With systemd as the service manager
(NOTIFY_SOCKET) the descriptors go there instead, and come back as LISTEN_FDS at the next start.

Source: sd_notify(3) FDSTORE=1, sd_listen_fds(3).
"""

from __future__ import annotations

import os
import signal
import socket
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

_DONE = b"done"
_FIRST_PASSED = 3
_PREFIX = "guestmem-"


def name_of(number: int) -> str:
    """The name of the n-th memory."""
    return f"{_PREFIX}{number}"


class Keeper:
    """What was kept, by name. `release` once it is safe elsewhere; closed without that it stays where it was."""

    def __init__(self, memfds: dict[str, int], connection: socket.socket | None) -> None:
        self.memfds = memfds
        self._connection = connection

    def release(self) -> None:
        """The keeper may end, or the store forget."""
        if self._connection is None:
            for name in self.memfds:
                notify(f"FDSTOREREMOVE=1\nFDNAME={name}")
            return
        self._connection.send(_DONE)
        self._connection.recv(1)  # its end
        self._connection.close()

    def close(self) -> None:
        for fd in self.memfds.values():
            os.close(fd)
        if self._connection is not None:
            self._connection.close()


def keep(directory: Path, memfds: Mapping[str, int]) -> None:
    """Have the descriptors outlive this process. Raises: OSError."""
    if os.environ.get("NOTIFY_SOCKET"):
        for name, fd in memfds.items():
            notify(f"FDSTORE=1\nFDNAME={name}", fd)
        return
    path = directory / "keeper"
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen(8)
        child = os.fork()
        if not child:
            os.setsid()
            if os.fork():
                os._exit(0)
            _live(listener, memfds, path)
        os.waitpid(child, 0)


def _live(listener: socket.socket, memfds: Mapping[str, int], path: Path) -> None:
    """The keeper's life."""
    try:
        _become_small({listener.fileno(), *memfds.values()})
        while True:
            connection, _ = listener.accept()
            with connection, suppress(OSError):
                for name, fd in memfds.items():
                    socket.send_fds(connection, [name.encode()], [fd])
                connection.send(b".")
                if connection.recv(16) == _DONE:
                    path.unlink(missing_ok=True)
                    return
    finally:
        os._exit(0)


def _become_small(needed: set[int]) -> None:
    """A terminal's signals are not for it, and of the server's descriptors these alone."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) not in needed:
            with suppress(OSError):
                os.close(int(name))


def fetch(directory: Path) -> Keeper:
    """What a server before has left to be kept; nothing if there is no keeper. Raises: OSError."""
    passed = dict(_passed_by_systemd())
    if passed:
        return Keeper(passed, None)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.connect(str(directory / "keeper"))
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        return Keeper({}, None)
    memfds: dict[str, int] = {}
    while True:
        name, fds, _, _ = socket.recv_fds(connection, 256, 1)
        if not fds:
            return Keeper(memfds, connection)
        os.set_inheritable(fds[0], False)
        memfds[name.decode()] = fds[0]


def _passed_by_systemd() -> Iterator[tuple[str, int]]:
    """Source: sd_listen_fds_with_names(3)."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    for place in range(int(os.environ.get("LISTEN_FDS", "0"))):
        fd = _FIRST_PASSED + place
        if place < len(names) and names[place].startswith(_PREFIX) and stat.S_ISREG(os.fstat(fd).st_mode):
            os.set_inheritable(fd, False)
            yield names[place], fd


def notify(message: str, fd: int | None = None) -> None:
    """Tell the service manager, if there is one. Source: sd_notify(3). Raises: OSError."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.connect(address)
        if fd is None:
            manager.send(message.encode())
        else:
            socket.send_fds(manager, [message.encode()], [fd])
