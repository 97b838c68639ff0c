"""Supervisor: hears of notifications and of stops, and tells the thread that they are about."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
from typing import TYPE_CHECKING

from guestmem.serve.seccomp import ptrace, table
from guestmem.serve.seccomp.bpf import SystemCall
from guestmem.serve.seccomp.descriptors import Known
from guestmem.serve.seccomp.listener import Gone, Listener
from guestmem.serve.seccomp.numbers import Nr
from guestmem.serve.seccomp.process import Process
from guestmem.serve.seccomp.start import Started
from guestmem.serve.seccomp.tracee import Tracee, Work
from guestmem.serve.seccomp.user_memory import read_memory

if TYPE_CHECKING:
    from guestmem.serve.server import Server

_libc = ctypes.CDLL(None, use_errno=True)
_SIGNAL_INFO = 128
_CLONE_VM, _CLONE_THREAD = 0x100, 0x10000


class Supervisor:
    """All threads that one started program and its children have. `status` is how the program ended, as subprocess has
    it: an exit code, or minus a signal."""

    def __init__(self, server: Server, started: Started) -> None:
        self.server = server
        self.pid = started.pid
        self.program = started.program
        self.cookie = started.cookie
        self.first_fd = started.first_fd
        self.listener = Listener(started.listener)
        self.status: int | None = None
        self.tracees: dict[int, Tracee] = {}
        self.masks: dict[int, int] = {}
        """KVM_SET_SIGNAL_MASK, by inode number of the vCPU's file."""
        self.known = Known(self.first_fd)
        self.closing = 0
        """How many threads are doing calls that close files; what those release is to be known when they are done."""
        self._early: dict[int, int] = {}  # the first stop of a thread that its parent has not told of yet
        self._children = _signal_descriptor()
        server.watch(self.listener.fd, self._on_notification)
        server.watch(self._children, self._on_children)
        self._add(Process(self, self.pid), self.pid, self.pid)

    @property
    def ended(self) -> bool:
        """The program and all that it started."""
        return not self.tracees

    def kill(self) -> None:
        """End what is left, and wait for it."""
        for pid in {tracee.tgid for tracee in self.tracees.values()}:
            os.kill(pid, signal.SIGKILL)
        while self.tracees:
            self._reaped(*os.waitpid(-1, ptrace.WAIT_ALL))

    def close(self) -> None:
        for fd in (self._children, self.listener.fd):
            self.server.unwatch(fd)
        os.close(self._children)
        self.listener.close()

    # Notifications

    def _on_notification(self) -> None:
        notification = self.listener.receive()
        if notification is None:
            return
        tracee = self.tracees.get(notification.tid)
        if tracee is not None:
            tracee.process.instruction = notification.call.ip - 2
            if tracee.notified(notification):
                return
        work = self._look_at(tracee, notification.call) if tracee is not None else None
        with contextlib.suppress(Gone):
            if isinstance(work, int):
                self.listener.answer(notification.id, work)
            elif tracee is None:
                self.listener.let_run(notification.id)
            elif work is None:
                tracee.let_run(notification.id, notification.call)
            else:
                tracee.begin(notification.call, notification.id, work)

    def _look_at(self, tracee: Tracee, call: SystemCall) -> Work:
        try:
            return table.handle(tracee, call)
        except OSError:  # it has been killed
            return None
        except Exception as bug:  # must not take the other clients along
            self.server.report.bug(f"system call {call}", bug)
            return -errno.EIO

    # Stops

    def _on_children(self) -> None:
        os.read(self._children, _SIGNAL_INFO)
        with contextlib.suppress(ChildProcessError):
            while (reaped := os.waitpid(-1, os.WNOHANG | ptrace.WAIT_ALL))[0]:
                self._reaped(*reaped)
        if self.closing:
            self.server.notice_releases()

    def _reaped(self, tid: int, status: int) -> None:
        tracee = self.tracees.get(tid)
        if not os.WIFSTOPPED(status):
            if tracee is not None:
                self._remove(tracee)
            if tid == self.pid:
                self.status = os.waitstatus_to_exitcode(status)
        elif tracee is not None:
            tracee.stopped(status)
        else:
            self.known = Known(self.first_fd)
        self._early[tid] = status

    def event(self, tracee: Tracee, event: int) -> None:
        """A ptrace event in the middle of a call of `tracee`."""
        if event == ptrace.EVENT_EXIT:  # it may remain as a zombie for long, if it is the first of its process
            tracee.gone()
            tracee.process.remove(tracee)
        elif event == ptrace.EVENT_VFORK_DONE:
            tracee.in_vfork = False
        elif event == ptrace.EVENT_EXEC:
            self._executed(tracee)
        elif event in (ptrace.EVENT_FORK, ptrace.EVENT_VFORK, ptrace.EVENT_CLONE):
            tracee.in_vfork = event == ptrace.EVENT_VFORK
            self._born(tracee, ptrace.event_message(tracee.tid))

    def _born(self, parent: Tracee, tid: int) -> None:
        flags = _clone_flags(parent)
        shares = bool(flags & _CLONE_VM)
        process = parent.process if shares else Process(self, tid, parent.process.instruction)
        child = self._add(process, tid, parent.tgid if flags & _CLONE_THREAD else tid)
        if not shares and parent.process.has_areas:
            self.server.scheduler.begin(self._inherit(child, parent.process), "fork")
        if (status := self._early.pop(tid, None)) is not None:
            child.stopped(status)

    async def _inherit(self, child: Tracee, parent: Process) -> None:
        """A child has its parent's mappings, and must not run before they are guarded in it."""
        with contextlib.suppress(Gone, ProcessLookupError):  # it has been killed
            async with child.held():
                await child.process.prepare_guard(child)
                await child.client.memory.fork_of(parent.client.memory)

    def _executed(self, tracee: Tracee) -> None:
        """A new program: new memory, one thread, by the process's id whichever thread it was that called exec."""
        pid = tracee.tid
        for former in [t for t in self.tracees.values() if t.tgid == pid]:
            self._remove(former)
        self._add(Process(self, pid), pid, pid)

    def _add(self, process: Process, tid: int, tgid: int) -> Tracee:
        tracee = Tracee(process, tid, tgid)
        process.tracees.add(tracee)
        self.tracees[tid] = tracee
        return tracee

    def _remove(self, tracee: Tracee) -> None:
        del self.tracees[tracee.tid]
        if tracee.tid == tracee.tgid:
            self.known.forget()
        tracee.gone()
        tracee.process.remove(tracee)


def _clone_flags(tracee: Tracee) -> int:
    """Of the call in which a thread is: fork(), vfork(), clone() or clone3()."""
    registers = ptrace.registers(tracee.tid)
    if registers.orig_rax == Nr.CLONE:
        return registers.rdi
    if registers.orig_rax == Nr.CLONE3:
        return int.from_bytes(read_memory(tracee.tid, registers.rdi, 8) or b"", "little")
    return _CLONE_VM if registers.orig_rax == Nr.VFORK else 0


def _signal_descriptor() -> int:
    """Readable when a child of ours has changed its state. SIGCHLD is blocked: see `start`."""
    mask = (ctypes.c_uint64 * 16)(1 << (signal.SIGCHLD - 1))
    fd = _libc.signalfd(-1, ctypes.byref(mask), os.O_NONBLOCK | os.O_CLOEXEC)
    if fd < 0:
        raise OSError(ctypes.get_errno(), "signalfd")
    return int(fd)
