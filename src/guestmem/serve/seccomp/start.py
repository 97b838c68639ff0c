"""Start a program under a seccomp filter and ptrace, as any user: neither takes a privilege for one's own children."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import resource
import secrets
import signal
import socket
import struct
from collections.abc import Sequence
from typing import NamedTuple

from guestmem.serve.seccomp import ptrace
from guestmem.serve.seccomp.filter import build
from guestmem.serve.seccomp.numbers import Nr

_libc = ctypes.CDLL(None, use_errno=True)
_PR_SET_NO_NEW_PRIVS = 38
_SET_MODE_FILTER, _NEW_LISTENER, _WAIT_KILLABLE_RECV = 1, 1 << 3, 1 << 5
_FIRST_FD = 512
_FAILURE = struct.Struct("<i")


class CannotTrace(Exception):
    """The machine, or the container that we are in, refuses what this takes."""


class Started(NamedTuple):
    """A program on its way: it calls exec when `go` is written to. `failure` reads as its errno if that fails."""

    pid: int
    listener: int
    program: bytes
    cookie: int
    first_fd: int
    control: socket.socket

    def go(self) -> None:
        self.control.send(b"g")

    def exec_error(self) -> int:
        """Once the program has ended: the errno of its exec, or 0."""
        try:
            message = self.control.recv(_FAILURE.size)
        except OSError:
            message = b""
        self.control.close()
        return int(_FAILURE.unpack(message)[0]) if len(message) == _FAILURE.size else 0


def start(command: Sequence[str]) -> Started:
    """Fork, have the filter installed, trace. SIGCHLD is blocked here from now on. `command[0]` is a path.

    Raises: CannotTrace, with what is missing.
    """
    first_fd = _first_descriptor()
    cookie = secrets.randbits(31) | 1 << 31
    program = build(first_fd, cookie, paths=not os.path.exists("/dev/kvm"))
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if not pid:
        ours.close()
        _child(command, program, theirs)
    theirs.close()
    try:
        listener = _receive_listener(ours)
        _seize(pid)
    except CannotTrace:
        ours.close()  # ends the child
        os.waitpid(pid, 0)
        raise
    return Started(pid, listener, program, cookie, first_fd, ours)


def _first_descriptor() -> int:
    """Far from the client's own, and where it may have some."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _FIRST_FD if limit == resource.RLIM_INFINITY or limit >= 2 * _FIRST_FD else max(limit // 2, 3)


def _receive_listener(control: socket.socket) -> int:
    message, fds, _, _ = socket.recv_fds(control, _FAILURE.size, 1)
    if fds:
        return fds[0]
    error = _FAILURE.unpack(message)[0] if len(message) == _FAILURE.size else errno.EIO
    raise CannotTrace(
        f"seccomp(NEW_LISTENER, WAIT_KILLABLE_RECV): {os.strerror(error)}. Static programs need seccomp notification "
        "(Linux 5.19, CONFIG_SECCOMP_FILTER), in a container that allows it and does not listen itself"
    )


def _seize(pid: int) -> None:
    try:
        ptrace.seize(pid)
    except OSError as error:
        raise CannotTrace(
            f"ptrace(PTRACE_SEIZE): {os.strerror(error.errno or 0)}. Static programs need ptrace of one's own "
            "children: kernel.yama.ptrace_scope below 3, a container that allows ptrace, and no debugger on it"
        ) from error


def _child(command: Sequence[str], program: bytes, control: socket.socket) -> None:
    """In the new process. Nothing here may call what the filter notifies, before we are traced."""
    gc.disable()
    try:
        instructions = ctypes.create_string_buffer(program, len(program))
        argument = struct.pack("<HxxxxxxQ", len(program) // 8, ctypes.addressof(instructions))
        environment = dict(os.environ)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them
            signal.signal(number, signal.SIG_DFL)
        _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        listener = _libc.syscall(Nr.SECCOMP, _SET_MODE_FILTER, _NEW_LISTENER | _WAIT_KILLABLE_RECV, argument)
        if listener < 0:
            control.send(_FAILURE.pack(ctypes.get_errno()))
        else:
            socket.send_fds(control, [b"f"], [listener])
            os.close(listener)
            if control.recv(1):
                _exec(command, environment, control)
    finally:
        os._exit(127)


def _exec(command: Sequence[str], environment: dict[str, str], control: socket.socket) -> None:
    try:
        os.execve(command[0], list(command), environment)
    except OSError as error:
        control.send(_FAILURE.pack(error.errno or errno.EIO))
