"""`python without.py NUMBER COMMAND...`: run a command to which one system call is refused with EPERM, as a container
does. The number is that of x86-64."""

from __future__ import annotations

import ctypes
import os
import struct
import sys

from guestmem.serve.seccomp.bpf import ALLOW, JUMP_EQUAL, LOAD, RETURN, Step, assemble

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _MODE_FILTER = 38, 22, 2
_EPERM = 0x00050001
"""SECCOMP_RET_ERRNO, and the errno."""


def main() -> None:
    number, command = int(sys.argv[1]), sys.argv[2:]
    refuse = Step(JUMP_EQUAL, number, yes="refuse")
    program = assemble([Step(LOAD, 0), refuse, Step(RETURN, ALLOW), "refuse", Step(RETURN, _EPERM)])
    instructions = ctypes.create_string_buffer(program, len(program))
    argument = struct.pack("<HxxxxxxQ", len(program) // 8, ctypes.addressof(instructions))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, argument, 0, 0):
        sys.exit(f"seccomp: {os.strerror(ctypes.get_errno())}")
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
