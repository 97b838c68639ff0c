"""Tracee: one thread of a client, and the system call of it that we work on.

A call begins as a notification: the thread waits in the kernel. It can be taken out of that by a signal, or by us when
code has to run in it (`hold`); then it is stopped, the notification is withdrawn, and one of two things follows:

- the call is finished while the thread is stopped: its result goes into the registers, and the signal, if there is one,
  is delivered after the call, as the kernel does with calls that cannot be interrupted;
- the thread goes on with the call unfinished: the kernel restarts it, which notifies again, and the call is carried on
  under the new notification. So a vCPU that runs is always where a signal finds it.

Methods that are no coroutines are called by the event loop; the coroutines by tasks.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import os
import signal
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

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
from guestmem.serve.seccomp.ptrace import Registers
from guestmem.serve.seccomp.signals import is_ignored
from guestmem.serve.seccomp.user_memory import read_memory
from guestmem.serve.wire import Op, Request, Upcall

if TYPE_CHECKING:
    from guestmem.serve.client import Client
    from guestmem.serve.seccomp.process import Process

OFFER = 0xAEFE
"""The ioctl that a thread is made to do when it is to get a descriptor: no KVM has it."""

_RESTART = (1 << 64) - 512
"""-ERESTARTSYS."""
_MASK = (1 << 64) - 1
_SYSCALL_INSTRUCTION = b"\x0f\x05"
_ALL_BUT_TRAP = _MASK & ~(1 << (signal.SIGTRAP - 1))


class State(enum.Enum):
    RUNNING = "runs, or is on its way into a stop or a notification"
    NOTIFIED = "waits in the kernel for the answer to its call"
    STOPPED = "waits in a ptrace stop"
    STEPPING = "does a call for us"


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


class Tracee:
    """A thread `tid` of process `tgid`, with the memory of `process`. See guestmem.serve.client_thread for what the
    server sees of it."""

    def __init__(self, process: Process, tid: int, tgid: int) -> None:
        self.process = process
        self.supervisor = process.supervisor
        self.tid = tid
        self.tgid = tgid
        self.state = State.RUNNING
        self.dead = False
        self.in_vfork = False
        """It sleeps until its child has called exec, and cannot be stopped."""
        self.task: Task[Any] | None = None
        self.call: SystemCall | None = None
        self.interruptible = False
        """A signal ends the call, as it does KVM_RUN."""
        self._script: Task[Any] | None = None
        self._result: Result | None = None
        self._answer: Reply | None = None
        self._notification = 0
        self._holds = 0
        self._stays = False  # stopped until the call is finished
        self._offer: tuple[int, int, bool] | None = None
        self._forget_stop()

    def _forget_stop(self) -> None:
        self._registers: Registers | None = None
        self._signal = 0
        self._signal_info: bytes | None = None
        self._own_mask: int | None = None  # while ours is set
        self._stepped = False
        self._group_stop = False
        self._signals_back: list[int] = []

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
                self._stays = not self.interruptible and self.call is not None
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
        """The result is there. If the thread is not where it can be told, the next event does this again."""
        if self.state is State.STOPPED:
            self._stays = False
            self.settle()
        elif self.state is State.NOTIFIED and not self.process.frozen:
            assert self._result is not None
            listener = self.supervisor.listener
            try:
                if isinstance(self._result, int):
                    listener.answer(self._notification, self._result)
                else:
                    listener.let_run(self._notification)
            except Gone:
                self.state = State.RUNNING
            else:
                self.state = State.RUNNING
                self._end_call()

    def _end_call(self) -> None:
        self.call = None
        self._result = None
        self._stays = False
        self.interruptible = False

    # Events

    def notified(self, notification: Notification) -> bool:
        """A notification arrived; False if it begins a new call."""
        if self.state is State.STEPPING:
            self._hand_over(notification)
            return True
        if self.call is None:
            return False
        self.state = State.NOTIFIED
        self._notification = notification.id
        if self._result is not None:
            self._finish()
        return True

    def stopped(self, status: int) -> None:
        """waitpid() said so."""
        number, event = os.WSTOPSIG(status), status >> 16
        if self.state is State.STEPPING:
            self._step_ended(number, event)
            return
        self._forget_stop()
        self.state = State.STOPPED
        if event and event != ptrace.EVENT_STOP:
            self._pass_event(event)
            return
        if event:
            self._group_stop = number != signal.SIGTRAP
        else:
            self._signal = number
            self._consider_signal()
        self.settle()

    def _pass_event(self, event: int) -> None:
        """It stopped in the middle of a call, where nothing can be done with it."""
        self.supervisor.event(self, event)
        with contextlib.suppress(ProcessLookupError):
            ptrace.resume(self.tid)
            self.state = State.RUNNING
            if self._holds or self.process.frozen:
                ptrace.interrupt(self.tid)

    def _consider_signal(self) -> None:
        """A signal came. In the middle of a call it waits for the end of it, which it may bring about."""
        if self.call is None:
            return
        ignored = is_ignored(self.tid, self._signal)
        if self.interruptible and not ignored and self._script is not None:
            self._script.signal_pending = True
        self._stays = not (self.interruptible and ignored)

    def gone(self) -> None:
        """The thread is no more."""
        self.dead = True
        self.state = State.RUNNING
        if self._script is not None:
            self._script.signal_pending = True

    # Stopping

    async def hold(self) -> None:
        """Have the thread stopped until `release`. Raises: Gone."""
        self._holds += 1
        if self.state in (State.RUNNING, State.NOTIFIED):
            self.interrupt()
        await park(Operation("stop", self.tid, lambda: self.state is State.STOPPED or self.dead))
        if self.dead:
            raise Gone

    def interrupt(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            ptrace.interrupt(self.tid)

    def release(self) -> None:
        self._holds -= 1
        self.settle()

    def stay(self) -> None:
        """Remain stopped until the call is finished, rather than have it restarted."""
        self._stays = True

    def release_at_end(self) -> None:
        """Give up a hold, but stay stopped until the call is finished."""
        self._stays = True
        self.release()

    @asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        try:
            await self.hold()
            yield
        finally:
            self.release()

    def thaw(self) -> None:
        """The process is not frozen any more."""
        if self._result is not None:
            self._finish()
        else:
            self.settle()

    def settle(self) -> None:
        """Let the thread go on unless somebody holds it."""
        if self.state is not State.STOPPED or self.dead or self._holds or self.process.frozen:
            return
        with contextlib.suppress(ProcessLookupError):  # it has been killed
            if self._result is not None:
                self._put_result(self._result)
            elif self._stays:
                return
            elif self.call is None and self._signal:
                self._put_off_call()
            self._resume()

    def registers(self) -> Registers:
        """Those of the stopped thread; changes to them take effect when it goes on."""
        if self._registers is None:
            self._registers = ptrace.registers(self.tid)
        return self._registers

    def _put_result(self, result: Result) -> None:
        assert self.call is not None
        registers = self.registers()
        if isinstance(result, int):
            registers.rip = self.call.ip
            registers.rax = result & _MASK
            registers.orig_rax = _MASK
            self._end_call()
        elif self._signal:  # the handler first
            self._rewind(registers, self.call.number, self.call.ip)
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
        if evaluate(self.supervisor.program, call) == NOTIFY:
            self._rewind(registers, call.number, call.ip)

    def _rewind(self, registers: Registers, number: int, ip: int) -> None:
        registers.rip = ip - len(_SYSCALL_INSTRUCTION)
        registers.rax = number
        registers.orig_rax = _MASK

    def _resume(self) -> None:
        if self._registers is not None:
            ptrace.set_registers(self.tid, self._registers)
        if self._own_mask is not None:
            ptrace.set_signal_mask(self.tid, self._own_mask)
        if self._signal and self._signal_info is not None:
            ptrace.set_signal_info(self.tid, self._signal_info)
        for number in self._signals_back:
            os.kill(self.tgid, number)
        if self._group_stop and not self._stepped:
            ptrace.listen(self.tid)
        else:
            ptrace.resume(self.tid, self._signal)
        self._forget_stop()
        self.state = State.RUNNING

    def swap_signal_mask(self, mask: int) -> int:
        """Change what the stopped thread blocks; what it was."""
        former = self._own_mask if self._own_mask is not None else ptrace.signal_mask(self.tid)
        if self._own_mask is not None:
            self._own_mask = mask
        else:
            ptrace.set_signal_mask(self.tid, mask)
        return former

    # Calls that it does for us

    async def inject(self, number: Nr, *arguments: int) -> int:
        """Have the stopped thread do a system call; what that returned, as the kernel has it: -errno for an error.

        Raises: Gone.
        """
        words = [argument & _MASK for argument in arguments] + [0] * (6 - len(arguments))
        words[4] = words[4] & 0xFFFF_FFFF | self.supervisor.cookie << 32
        return await self._inject(number, words)

    async def inject_as_is(self, number: Nr, words: list[int]) -> int:
        """For calls that use the place of the cookie: they are notified, and let run. Raises: Gone."""
        return await self._inject(number, words)

    async def _inject(self, number: int, words: list[int], offer: tuple[int, int, bool] | None = None) -> int:
        await park(Operation("inject", self.tid, lambda: self.state is State.STOPPED or self.dead))
        if self.dead:
            raise Gone
        own = self.registers()
        if self._own_mask is None:
            if self._signal:
                self._signal_info = ptrace.signal_info(self.tid)
            self._own_mask = ptrace.signal_mask(self.tid)
            ptrace.set_signal_mask(self.tid, _ALL_BUT_TRAP)
        registers = own.copy()
        registers.rip = self._instruction(own)
        registers.rax, registers.orig_rax = number, _MASK
        registers.rdi, registers.rsi, registers.rdx, registers.r10, registers.r8, registers.r9 = words
        ptrace.set_registers(self.tid, registers)
        self._offer = offer
        self._stepped = True
        self.state = State.STEPPING
        ptrace.step(self.tid)
        await park(Operation("step", self.tid, lambda: self.state is State.STOPPED or self.dead))
        if self.dead:
            raise Gone
        result = ptrace.registers(self.tid).rax
        return result - (1 << 64) if result >> 63 else result

    def _instruction(self, registers: Registers) -> int:
        """Where in the thread's memory there is an instruction that calls. Raises: Gone."""
        for place in (registers.rip - len(_SYSCALL_INSTRUCTION), self.process.instruction):
            if read_memory(self.tid, place, len(_SYSCALL_INSTRUCTION)) == _SYSCALL_INSTRUCTION:
                return place
        raise Gone

    def _step_ended(self, number: int, event: int) -> None:
        if number == signal.SIGTRAP and not event:
            self.state = State.STOPPED
            return
        if not event:  # SIGSTOP: nobody can block that
            self._signals_back.append(number)
        with contextlib.suppress(ProcessLookupError):
            ptrace.step(self.tid)

    async def sync_releases(self) -> None:
        """Wait until what the thread has closed is released."""
        self.supervisor.server.notice_releases()
        await self.request(Op.SYNC)

    # Descriptors

    async def install(self, fd: int, cloexec: bool, at_least: int = 0) -> int:
        """Open a descriptor of ours, which is closed here, in the client; the new number, or -EMFILE. Raises: Gone."""
        try:
            while True:
                await park(
                    Operation("install", self.tid, lambda: self.state in (State.NOTIFIED, State.STOPPED) or self.dead)
                )
                if self.dead:
                    raise Gone
                number = self._free_number(at_least)
                if self.state is State.STOPPED:
                    async with self.held():
                        return await self._offer_descriptor(fd, number, cloexec)
                try:
                    self.supervisor.listener.add_descriptor(self._notification, fd, number, cloexec)
                except Gone:
                    self.state = State.RUNNING
                except OSError:
                    return -errno.EMFILE
                else:
                    return number
        finally:
            close_all([fd])

    async def _offer_descriptor(self, fd: int, number: int, cloexec: bool) -> int:
        """Only a notification can give a descriptor, so the stopped thread is made to ask for it."""
        return await self._inject(Nr.IOCTL, [_MASK, OFFER, 0, 0, 0, 0], (fd, number, cloexec))

    def _hand_over(self, notification: Notification) -> None:
        listener = self.supervisor.listener
        with contextlib.suppress(Gone):
            if self._offer is None:
                listener.let_run(notification.id)
                return
            try:
                listener.add_descriptor(notification.id, *self._offer, answer=True)
            except OSError:
                listener.answer(notification.id, -errno.EMFILE)

    def _free_number(self, at_least: int) -> int:
        """The lowest that is free, from where our descriptors begin."""
        used = {int(name) for name in os.listdir(f"/proc/{self.tid}/fd")}
        number = max(at_least, self.supervisor.first_fd)
        while number in used:
            number += 1
        return number
