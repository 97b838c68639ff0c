"""StoppableThread: what can be done with a thread that is stopped under ptrace, and how it gets there and away."""

from __future__ import annotations

import contextlib
import enum
import errno
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from guestmem.sched import Operation, park
from guestmem.serve.seccomp import ptrace
from guestmem.serve.seccomp.listener import Gone, Notification
from guestmem.serve.seccomp.numbers import Nr
from guestmem.serve.seccomp.ptrace import Registers
from guestmem.serve.seccomp.user_memory import read_memory

if TYPE_CHECKING:
    from guestmem.serve.seccomp.process import Process

OFFER = 0xAEFE
"""The ioctl that a thread is made to do when it is to get a descriptor: no KVM has it."""

SYSCALL_INSTRUCTION = b"\x0f\x05"
_MASK = (1 << 64) - 1
_ALL_BUT_TRAP = _MASK & ~(1 << (signal.SIGTRAP - 1))


class State(enum.Enum):
    RUNNING = "runs, or is on its way into a stop or a notification"
    NOTIFIED = "waits in the kernel for the answer to its call"
    STOPPED = "waits in a ptrace stop"
    STEPPING = "does a call for us"


class StoppableThread:
    """A thread `tid` of process `tgid`, with the memory of `process`. `Gone` is raised when it has died."""

    def __init__(self, process: Process, tid: int, tgid: int) -> None:
        self.process = process
        self.supervisor = process.supervisor
        self.tid = tid
        self.tgid = tgid
        self.state = State.RUNNING
        self.dead = False
        self.in_vfork = False
        """It sleeps until its child has called exec, and cannot be stopped."""
        self._notification = 0
        self._holds = 0
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

    # Stopping

    async def hold(self) -> None:
        """Have the thread stopped until `release`. Raises: Gone."""
        self._holds += 1
        self.interrupt()
        await park(Operation("stop", self.tid, lambda: self.state is State.STOPPED or self.dead))
        if self.dead:
            raise Gone

    def interrupt(self) -> None:
        """Have it stop soon; a call that has been notified is taken back for that."""
        with contextlib.suppress(ProcessLookupError, Gone):
            if self.state in (State.RUNNING, State.NOTIFIED):
                ptrace.interrupt(self.tid)
            if self.state is State.NOTIFIED:
                self.state = State.RUNNING
                self.supervisor.listener.take_back(self._notification)

    def release(self) -> None:
        self._holds -= 1
        self.settle()

    @asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        try:
            await self.hold()
            yield
        finally:
            self.release()

    def settle(self) -> None:
        """Let the thread go on unless somebody holds it, or it has a reason of its own to stay."""
        if self.state is not State.STOPPED or self.dead or self._holds or self.process.frozen:
            return
        with contextlib.suppress(ProcessLookupError):  # it has been killed
            if self._may_go_on():
                self._resume()

    def _may_go_on(self) -> bool:
        """Whether nothing but holds stops it; its registers are what they are to be."""
        return True

    def registers(self) -> Registers:
        """Those of the stopped thread; changes to them take effect when it goes on."""
        if self._registers is None:
            self._registers = ptrace.registers(self.tid)
        return self._registers

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
        for place in (registers.rip - len(SYSCALL_INSTRUCTION), self.process.instruction):
            if read_memory(self.tid, place, len(SYSCALL_INSTRUCTION)) == SYSCALL_INSTRUCTION:
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
