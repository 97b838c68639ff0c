"""ptrace(2), the requests that we use. Each raises OSError; ESRCH: the thread is not stopped, or dead.

Source: man 2 ptrace; x86-64's struct user_regs_struct (sys/user.h).
"""

from __future__ import annotations

import ctypes
import os

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]

_CONT, _SINGLESTEP, _GETREGS, _SETREGS = 7, 9, 12, 13
_GETEVENTMSG, _GETSIGINFO, _SETSIGINFO = 0x4201, 0x4202, 0x4203
_SEIZE, _INTERRUPT, _LISTEN, _GETSIGMASK, _SETSIGMASK = 0x4206, 0x4207, 0x4208, 0x420A, 0x420B

EVENT_FORK, EVENT_VFORK, EVENT_CLONE, EVENT_EXEC, EVENT_VFORK_DONE, EVENT_EXIT = range(1, 7)
EVENT_STOP = 128
_EXITKILL = 1 << 20
_OPTIONS = sum(1 << event for event in range(EVENT_FORK, EVENT_EXIT + 1)) | _EXITKILL
"""And nobody is left behind with a filter that nobody listens to."""

WAIT_ALL = 0x40000000
"""__WALL: threads, too."""

_SIGINFO_SIZE = 128
_REGISTERS = (
    *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi"),
    *("orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"),
)


class Registers(ctypes.Structure):
    """struct user_regs_struct. `orig_rax` is the number of the system call that the thread is in, or -1."""

    _fields_ = [(name, ctypes.c_uint64) for name in _REGISTERS]

    rax: int
    orig_rax: int
    rip: int
    rdi: int
    rsi: int
    rdx: int
    r10: int
    r8: int
    r9: int

    def copy(self) -> Registers:
        return Registers.from_buffer_copy(self)


def _ptrace(request: int, tid: int, address: object = None, data: object = None) -> None:
    if _libc.ptrace(request, tid, address, data) < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"ptrace: {os.strerror(error)}")


def seize(pid: int) -> None:
    """Trace a process and all that it will start."""
    _ptrace(_SEIZE, pid, None, _OPTIONS)


def interrupt(tid: int) -> None:
    """Have a thread stop (EVENT_STOP), or stop for another reason that comes first."""
    _ptrace(_INTERRUPT, tid)


def resume(tid: int, signal: int = 0) -> None:
    """Let a stopped thread go on; with `signal` as if that were what it stopped for."""
    _ptrace(_CONT, tid, None, signal)


def step(tid: int) -> None:
    """One instruction, then SIGTRAP."""
    _ptrace(_SINGLESTEP, tid)


def listen(tid: int) -> None:
    """Leave a thread in its job-control stop; SIGCONT ends that."""
    _ptrace(_LISTEN, tid)


def registers(tid: int) -> Registers:
    found = Registers()
    _ptrace(_GETREGS, tid, None, ctypes.addressof(found))
    return found


def set_registers(tid: int, registers: Registers) -> None:
    _ptrace(_SETREGS, tid, None, ctypes.addressof(registers))


def signal_mask(tid: int) -> int:
    """The signals that a thread blocks; bit n - 1 is signal n."""
    mask = ctypes.c_uint64()
    _ptrace(_GETSIGMASK, tid, 8, ctypes.addressof(mask))
    return mask.value


def set_signal_mask(tid: int, mask: int) -> None:
    _ptrace(_SETSIGMASK, tid, 8, ctypes.addressof(ctypes.c_uint64(mask)))


def signal_info(tid: int) -> bytes:
    """The siginfo_t of the signal that a thread stopped for."""
    info = ctypes.create_string_buffer(_SIGINFO_SIZE)
    _ptrace(_GETSIGINFO, tid, None, ctypes.addressof(info))
    return info.raw


def set_signal_info(tid: int, info: bytes) -> None:
    buffer = ctypes.create_string_buffer(info, _SIGINFO_SIZE)
    _ptrace(_SETSIGINFO, tid, None, ctypes.addressof(buffer))


def event_message(tid: int) -> int:
    """What comes with an event: the new thread's id, or at EVENT_EXEC the caller's former one."""
    message = ctypes.c_ulong()
    _ptrace(_GETEVENTMSG, tid, None, ctypes.addressof(message))
    return message.value
