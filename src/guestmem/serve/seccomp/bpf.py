"""Classic BPF, as seccomp filters are written: a small assembler with labels, and an evaluator."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

LOAD, AND, RETURN = 0x20, 0x54, 0x06
JUMP_EQUAL, JUMP_GREATER_EQUAL, JUMP_ANY_BIT = 0x15, 0x35, 0x45

ALLOW, NOTIFY = 0x7FFF0000, 0x7FC00000
"""SECCOMP_RET_ALLOW, SECCOMP_RET_USER_NOTIF."""

_INSTRUCTION = struct.Struct("<HBBI")
_DATA = struct.Struct("<iIQ6Q")
_MAX_JUMP = 255


class Step(NamedTuple):
    """An instruction. A jump goes to the label `yes` or `no`; "" is the next instruction."""

    code: int
    operand: int
    yes: str = ""
    no: str = ""


Source: TypeAlias = Sequence[Step | str]
"""Instructions, and labels before them."""


class SystemCall(NamedTuple):
    """struct seccomp_data. `ip` is the address after the instruction that calls."""

    number: int
    arch: int
    ip: int
    arguments: tuple[int, ...]

    def pack(self) -> bytes:
        return _DATA.pack(self.number, self.arch, self.ip, *self.arguments)


def argument_low(number: int) -> int:
    """Where in struct seccomp_data the low 32 bits of an argument are."""
    return 16 + 8 * number


def argument_high(number: int) -> int:
    return argument_low(number) + 4


def assemble(source: Source) -> bytes:
    """struct sock_filter[]. Raises: KeyError for a label that is not there; ValueError for a jump too far."""
    places: dict[str, int] = {}
    steps: list[Step] = []
    for item in source:
        if isinstance(item, str):
            places[item] = len(steps)
        else:
            steps.append(item)

    def distance(at: int, label: str) -> int:
        jump = places[label] - at - 1 if label else 0
        if not 0 <= jump <= _MAX_JUMP:
            raise ValueError(f"a jump of {jump} to {label!r}")
        return jump

    return b"".join(
        _INSTRUCTION.pack(step.code, distance(at, step.yes), distance(at, step.no), step.operand)
        for at, step in enumerate(steps)
    )


def evaluate(program: bytes, call: SystemCall) -> int:
    """What the kernel would do with a call: ALLOW or NOTIFY."""
    steps = list(_INSTRUCTION.iter_unpack(program))
    data = call.pack()
    accumulator, at = 0, 0
    while True:
        code, yes, no, operand = steps[at]
        at += 1
        if code == RETURN:
            return int(operand)
        if code == LOAD:
            (accumulator,) = struct.unpack_from("<I", data, operand)
        elif code == AND:
            accumulator &= operand
        elif code == JUMP_EQUAL:
            at += yes if accumulator == operand else no
        elif code == JUMP_GREATER_EQUAL:
            at += yes if accumulator >= operand else no
        elif code == JUMP_ANY_BIT:
            at += yes if accumulator & operand else no
        else:
            raise ValueError(f"instruction {code:#x}")
