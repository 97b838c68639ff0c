"""The messages between the shim and the server, as docs/reference/wire.md has them."""

from __future__ import annotations

import enum
import struct
from typing import NamedTuple

VERSION = 2
MAX_MESSAGE = 64 << 10
MAX_COPY = 60 << 10
"""Bytes that one READ or WRITE upcall carries."""
MAX_FDS = 8

HELLO_HELPER, HELLO_FORKED = 1, 2
KEEP_ON_EXEC = 1
"""Bit of `a` of an answer: the descriptor that comes with it has no close-on-exec."""

FD_IN_ARGUMENT = 2
"""Another: its number is written at byte 4 of the ioctl's argument, and the ioctl returns `value`."""

_REQUEST = struct.Struct("<IIQQQQQ")
_ANSWER = struct.Struct("<IiqQQQQ")
HEADER = _REQUEST.size
assert HEADER == _ANSWER.size == 48


class Op(enum.IntEnum):
    """Requests."""

    HELLO = 1
    OPEN = 2
    IDENTIFY = 3
    IOCTL = 4
    RUN_FD = 5
    MMAP_CHECK = 6
    MMAP_DONE = 7
    UNMAP = 8
    MOVED = 9
    PROTECT = 10
    DISCARD = 11  # of traced clients alone
    FALLOCATE = 12
    REMOVE = 13
    SYNC = 14
    GUARD = 15
    CANCEL = 16
    UPCALL_DONE = 17
    STAT = 18
    VCPU = 19


class Upcall(enum.IntEnum):
    """What the server asks a client's thread to do."""

    ZAP = 1
    READ = 2
    WRITE = 3
    REPLACE = 4  # of traced clients alone, as PRIVATE
    OVERLAY = 6
    UNCOVER = 7
    PRIVATE = 8
    FD = 9
    ENTER = 10  # from here on of clients that run their vCPUs
    DROP = 11
    ALIAS = 12
    UNALIAS = 13
    KICK = 14
    FORGET = 15
    POPULATE = 16


class CpuMode(enum.IntEnum):
    """How the vCPUs of a client run: see enum cpu_mode of cpu/native/cpu.h."""

    SERIAL = 1
    PARALLEL = 2


class FileKind(enum.IntEnum):
    """What a descriptor of ours is."""

    NONE = 0
    KVM = 1
    VM = 2
    VCPU = 3
    GMEM = 4
    GUP_TEST = 5
    IOMMU = 6
    VFIO = 7
    LIVE_UPDATE = 8
    SESSION = 9


RUN_OWN = 1
"""RUN_FD for the shim's own use, which is no mmap() of the client."""
STOP_LEFT = 100
"""What ENTER answers instead of a stop: the exit is written, and KVM_RUN returns 0."""

OPEN_KVM, OPEN_GUP_TEST, OPEN_IOMMU, OPEN_VFIO = 1, 2, 3, 4
OPEN_LIVE_UPDATE = 100
"""What OPEN opens; VFIO device n is OPEN_VFIO + n."""
VFIO_DEVICES = 6


class Request(NamedTuple):
    """One message of a client. `file` is an inode number."""

    op: int
    flags: int
    file: int
    a: int
    b: int
    c: int
    d: int
    payload: bytes


def unpack_request(data: bytes) -> Request:
    """Raises: struct.error for a message that is too short to be one."""
    op, flags, file, a, b, c, d = _REQUEST.unpack_from(data)
    return Request(op, flags, file, a, b, c, d, data[HEADER:])


def pack_answer(value: int, error: int = 0, payload: bytes = b"", a: int = 0, b: int = 0, c: int = 0) -> bytes:
    """An answer: `value` or, if `error` is not 0, an errno."""
    return _ANSWER.pack(0, error, value, a, b, c, 0) + payload


class Answer(NamedTuple):
    """What goes back for a request; see `pack_answer`."""

    error: int
    value: int
    payload: bytes
    a: int
    b: int
    c: int


def unpack_answer(data: bytes) -> Answer:
    """The other way round."""
    _, error, value, a, b, c, _ = _ANSWER.unpack_from(data)
    return Answer(error, value, data[HEADER:], a, b, c)


def pack_upcall(op: Upcall, payload: bytes = b"", a: int = 0, b: int = 0, c: int = 0, d: int = 0) -> bytes:
    return _ANSWER.pack(op, 0, 0, a, b, c, d) + payload
