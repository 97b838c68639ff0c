"""Tracee: one thread of a client, and the system call of it that we work on.

A call begins as a notification: the thread waits in the kernel, where no signal gets at it, so that no answer can be
lost to one. Most calls are answered there. Some need the thread stopped, so that it can be made to call (`hold`); then
the notification is taken back, the thread remains stopped until the call is finished, and the result goes into its
registers. A call that a signal may end (KVM_RUN) and that does not end at once is treated so, too, but the thread does
not remain stopped: it sleeps in pause() meanwhile, where a signal stops it. A signal that comes in the middle of a call
is delivered at the end of it, as by the kernel.

Methods that are no coroutines are called by the event loop; the coroutines by tasks.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import os
import signal
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from guestmem.sched import Operation, Task, park
from guestmem.serve import wire
from guestmem.serve.call import Call
from guestmem.serve.channel import ClientGone, UpcallResult, close_all
from guestmem.serve.files import ServedFile
from guestmem.serve.seccomp import ptrace, upcalls
from guestmem.serve.seccomp.bpf import NOTIFY, SystemCall, evaluate
from guestmem.serve.seccomp.filter import ARCH
from guestmem.serve.seccomp.listener import Gone, Notification
from guestmem.serve.seccomp.numbers import Nr
from guestmem.serve.seccomp.signals import is_ignored
from guestmem.serve.seccomp.stoppable import SYSCALL_INSTRUCTION, State, StoppableThread
from guestmem.serve.wire import Op, Request, Upcall

if TYPE_CHECKING:
    from guestmem.serve.client import Client
    from guestmem.serve.seccomp.process import Process

_RESTART = (1 << 64) - 512
"""-ERESTARTSYS."""
_MASK = (1 << 64) - 1


class Reply(NamedTuple):
    """What the server said to a request. The descriptors are the receiver's to close."""

    error: int
    value: int
    a: int
    payload: bytes
    fds: list[int]


class Native(enum.Enum):
    """The result of a call that the kernel is to do itself."""

    NATIVE = 0


NATIVE = Native.NATIVE
Result = int | Native
Work: TypeAlias = Coroutine[Any, Any, Result] | int | None
"""What is to be done for a call: work, whose result it gets; or only give it a result; or None, the kernel does it."""


class Tracee(StoppableThread):
    """A thread of a client; to the server, a guestmem.serve.client_thread."""

    def __init__(self, process: Process, tid: int, tgid: int) -> None:
        super().__init__(process, tid, tgid)
        self.task: Task[Any] | None = None
        self.call: SystemCall | None = None
        self.interruptible = False
        """A signal ends the call, as it does KVM_RUN."""
        self._script: Task[Any] | None = None
        self._result: Result | None = None
        self._answer: Reply | None = None
        self._stays = False  # stopped until the call is finished, although it is interruptible
        self._native: SystemCall | None = None  # what the kernel does itself now
        self._prepared: SystemCall | None = None  # what it is to do when that comes again

    def __repr__(self) -> str:
        return f"<Tracee {self.tid} {self.state.name} {self.call}>"

    # To the server: see guestmem.serve.client_thread

    @property
    def client(self) -> Client:
        return self.process.client

    @property
    def open(self) -> bool:
        return not self.dead

    def answer(self, message: bytes, fds: list[int]) -> None:
        answer = wire.unpack_answer(message)
        self._answer = Reply(answer.error, answer.value, answer.a, answer.payload, fds)

    async def upcall(
        self,
        op: Upcall,
        payload: bytes = b"",
        a: int = 0,
        b: int = 0,
        c: int = 0,
        d: int = 0,
        fds: tuple[int, ...] = (),
    ) -> UpcallResult:
        """Raises: ClientGone."""
        try:
            if op not in upcalls.NEED_A_STOP:
                return await upcalls.do(self, op, payload, a, b, c, d, fds)
            async with self.held():
                return await upcalls.do(self, op, payload, a, b, c, d, fds)
        except (Gone, ProcessLookupError) as error:
            raise ClientGone from error

    # Calls

    async def request(
        self,
        op: Op,
        file: ServedFile | None = None,
        a: int = 0,
        b: int = 0,
        c: int = 0,
        d: int = 0,
        payload: bytes = b"",
    ) -> Reply:
        """Ask the server, as a shim does over its channel."""
        server = self.supervisor.server
        request = Request(op, 0, file.inode_number if file is not None else 0, a, b, c, d, payload)
        await server.serve(Call(server, self, self.client, request, file))
        assert self._answer is not None
        return self._answer

    def begin(self, call: SystemCall, notification: int, work: Coroutine[Any, None, Result]) -> None:
        """Work on a call that was notified."""
        self.call = call
        self.state = State.NOTIFIED
        self._notification = notification
        self.supervisor.server.scheduler.begin(self._work(work), "system call")
        if self.call is not None and (self.interruptible or self._holds):
            self.interrupt()

    async def _work(self, work: Coroutine[Any, None, Result]) -> None:
        self._script = self.supervisor.server.scheduler.current
        result: Result
        try:
            result = await work
        except (Gone, ClientGone, ProcessLookupError):
            result = -errno.EINTR  # nobody will see it
        except Exception as bug:  # must not take the other clients along
            self.supervisor.server.report.bug(f"system call {self.call}", bug)
            result = -errno.EIO
        self._script = None
        self._result = result
        self._finish()

    def _finish(self) -> None:
        """The result is there. If the thread is not where it can be told, the next stop does this again."""
        if self.state is State.NOTIFIED and not self.process.frozen:
            self.state = State.RUNNING
            with contextlib.suppress(Gone):
                if isinstance(self._result, int):
                    self.supervisor.listener.answer(self._notification, self._result)
                else:
                    self.let_run(self._notification, self.call)
            self._end_call()
        elif self.state is State.RUNNING:
            self.interrupt()
        else:
            self.settle()

    def let_run(self, notification: int, call: SystemCall | None) -> None:
        """Have the kernel do a call that was notified. Raises: Gone."""
        self.supervisor.listener.let_run(notification)
        self._native = call

    def _end_call(self) -> None:
        self.call = None
        self._result = None
        self._stays = False
        self.interruptible = False

    # Events

    def notified(self, notification: Notification) -> bool:
        """A notification arrived; False if it begins a call."""
        if self.state is State.STEPPING:
            self._hand_over(notification)
            return True
        prepared, self._native = notification.call == self._prepared, None
        self._prepared = None
        if prepared:
            with contextlib.suppress(Gone):
                self.let_run(notification.id, notification.call)
        return prepared

    def stopped(self, status: int) -> None:
        """waitpid() said so."""
        number, event = os.WSTOPSIG(status), status >> 16
        if event and event != ptrace.EVENT_STOP:
            self._pass_event(event)
            return
        if self.state is State.STEPPING:
            self._step_ended(number, event)
            return
        self._forget_stop()
        self.state = State.STOPPED
        if event:
            self._group_stop = number != signal.SIGTRAP
        else:
            self._signal = number
            self._consider_signal()
        self.settle()

    def _pass_event(self, event: int) -> None:
        """It stopped in the middle of a call, where nothing can be done with it. If it is to stop, then after that."""
        self._forget_stop()
        with contextlib.suppress(ProcessLookupError):  # it has been killed
            self.supervisor.event(self, event)
            if self._holds or self.process.frozen:
                ptrace.interrupt(self.tid)
            ptrace.resume(self.tid)
            self.state = State.RUNNING

    def _consider_signal(self) -> None:
        """A signal came. In the middle of a call it waits for the end of it, which it may bring about."""
        if self.call is None:
            return
        ignored = is_ignored(self.tid, self._signal)
        if self.interruptible and not ignored and self._script is not None:
            self._script.signal_pending = True
        self._stays = not ignored

    def gone(self) -> None:
        """The thread is no more."""
        self.dead = True
        self.state = State.RUNNING
        if self._script is not None:
            self._script.signal_pending = True

    # Stopping

    def release_at_end(self) -> None:
        """Give up a hold, but stay stopped until the call is finished."""
        self._stays = True
        self.release()

    def thaw(self) -> None:
        """The process is not frozen any more."""
        if self._result is not None:
            self._finish()
        else:
            self.settle()

    def _may_go_on(self) -> bool:
        if self._result is not None:
            self._put_result(self._result)
        elif self.call is not None:
            if self._stays or not self.interruptible:
                return False
            self._go_to(self.call, Nr.PAUSE)
        elif self._signal:
            self._put_off_call()
        return True

    def _put_result(self, result: Result) -> None:
        assert self.call is not None
        if isinstance(result, int):
            registers = self.registers()
            registers.rip = self.call.ip
            registers.rax = result & _MASK
            registers.orig_rax = _MASK
        else:
            self._go_to(self.call, self.call.number)
            self._prepared = self.call
        self._end_call()

    def _put_off_call(self) -> None:
        """A signal has withdrawn a notification before we received it, so the call has not begun. It does after the
        handler, which the kernel's own rules for restarting would not ensure."""
        registers = self.registers()
        if registers.rax != _RESTART or registers.orig_rax == _MASK:
            return
        names = ("rdi", "rsi", "rdx", "r10", "r8", "r9")
        arguments = tuple(getattr(registers, name) for name in names)
        call = SystemCall(registers.orig_rax, ARCH, registers.rip, arguments)
        if call != self._native and evaluate(self.supervisor.program, call) == NOTIFY:
            self._go_to(call, call.number)

    def _go_to(self, call: SystemCall, number: int) -> None:
        """Have the stopped thread do `number` where it did `call`, with the same arguments."""
        registers = self.registers()
        registers.rip = call.ip - len(SYSCALL_INSTRUCTION)
        registers.rax = number
        registers.orig_rax = _MASK

    async def close_by(self, number: Nr, *arguments: int) -> int:
        """Have the thread do a call that closes files, and wait for the releases that this leads to. Raises: Gone."""
        supervisor = self.supervisor
        supervisor.closing += 1
        try:
            async with self.held():
                result = await self.inject(number, *arguments)
        finally:
            supervisor.closing -= 1
            supervisor.known.forget()
        if result >= 0:
            await self.request(Op.SYNC)
        return result

    # Descriptors

    async def install(self, fd: int, cloexec: bool, at_least: int = 0) -> int:
        """Open a descriptor of ours, which is closed here, in the client; the new number, or -EMFILE. Raises: Gone."""
        try:
            await park(Operation("install", self.tid, self._is_quiet))
            if self.dead:
                raise Gone
            number = self._free_number(at_least)
            if self.state is State.STOPPED:
                async with self.held():
                    return await self._offer_descriptor(fd, number, cloexec)
            try:
                self.supervisor.listener.add_descriptor(self._notification, fd, number, cloexec)
            except OSError:
                return -errno.EMFILE
            return number
        finally:
            close_all([fd])

    def _is_quiet(self) -> bool:
        return self.dead or self.state in (State.NOTIFIED, State.STOPPED)

    def _free_number(self, at_least: int) -> int:
        """The lowest that is free, from where our descriptors begin."""
        used = {int(name) for name in os.listdir(f"/proc/{self.tid}/fd")}
        number = max(at_least, self.supervisor.first_fd)
        while number in used:
            number += 1
        return number
