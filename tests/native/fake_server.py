"""FakeServer: the other end of the wire, with just enough behind it to try the shim against.

A thread for each channel. Beside a few real ioctls it knows some of its own, by which a client asks for upcalls.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import mmap
import os
import select
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from errno import EINTR, EINVAL, ENOTTY
from pathlib import Path

from guestmem.cpu.block import BLOCK_SIZE, new_block
from guestmem.cpu.library import library_path

MESSAGE = 64 << 10
REQUEST = struct.Struct("<IIQQQQQ")
ANSWER = struct.Struct("<IiqQQQQ")

HELLO, OPEN, IDENTIFY, IOCTL, RUN_FD, MMAP_CHECK, MMAP_DONE, UNMAP, MOVED, PROTECT = range(1, 11)
FALLOCATE, REMOVE, SYNC, GUARD, CANCEL, UPCALL_DONE, STAT, VCPU_MEMORY = range(12, 20)
ZAP, READ, WRITE = range(1, 4)
OVERLAY, UNCOVER, FD = 6, 7, 9
HELLO_FORKED = 2
KVM, VM, VCPU, GMEM, GUP_TEST = range(1, 6)

CREATE_VM, CREATE_VCPU, CREATE_GMEM = 0xAE01, 0xAE41, 0xC040AED4
RUN, SET_REGS, GET_REGS = 0xAE80, 0x4090AE82, 0x8090AE81
# Of the tests alone. The argument is an address, or a number.
RELEASED, READ_SUM, WRITE_X, ZAP_PAGE, OVERLAY_PAGE, UNCOVER_PAGE, FD_FACTS, _, NOTED, DELAY, HELLOS, END = range(
    0xAEF0, 0xAEFC
)

UFFDIO_REGISTER, MISSING_AND_MINOR = 0xC020AA00, 1 | 4


@dataclass
class Request:
    payload: bytes
    fds: list[int]
    op: int
    flags: int
    file: int
    a: int
    b: int
    c: int
    d: int


@dataclass
class Answer:
    value: int = 0
    error: int = 0
    a: int = 0
    b: int = 0
    payload: bytes = b""
    fds: list[int] = field(default_factory=list)


def _readable(fd: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


@dataclass
class Known:
    """One of our files, and the end of it that the server keeps."""

    kind: int
    maker: int
    fd: int


class Channel:
    def __init__(self, server: FakeServer, sock: socket.socket) -> None:
        self.server = server
        self.sock = sock
        self.client = 0

    def receive(self) -> Request | None:
        try:
            data, ancillary, _, _ = self.sock.recvmsg(MESSAGE, socket.CMSG_SPACE(32))
        except OSError:
            return None
        if len(data) < REQUEST.size:
            return None
        fds = array.array("i")
        for _level, _kind, raw in ancillary:
            fds.frombytes(raw)
        return Request(data[REQUEST.size :], list(fds), *REQUEST.unpack_from(data))

    def send(self, head: bytes, payload: bytes, fds: list[int]) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if fds:
                socket.send_fds(self.sock, [head + payload], fds)
            else:
                self.sock.send(head + payload)

    def upcall(
        self, op: int, a: int = 0, b: int = 0, c: int = 0, d: int = 0, payload: bytes = b"", fds: tuple[int, ...] = ()
    ) -> Request:
        self.send(ANSWER.pack(op, 0, 0, a, b, c, d), payload, list(fds))
        done = self.receive()
        assert done is not None and done.op == UPCALL_DONE
        return done

    def cancelled(self, seconds: float) -> bool:
        """Whether a CANCEL came within the time, or the client went."""
        if not _readable(self.sock.fileno(), seconds):
            return False
        request = self.receive()
        return request is None or request.op == CANCEL

    def serve(self) -> None:
        while (request := self.receive()) is not None:
            if request.op == CANCEL:
                continue
            answer = self.server.answer(self, request)
            self.send(ANSWER.pack(0, answer.error, answer.value, answer.a, answer.b, 0, 0), answer.payload, answer.fds)
            for fd in answer.fds + request.fds:
                with contextlib.suppress(OSError):
                    os.close(fd)
        self.sock.close()


class FakeServer:
    """`run_time`: seconds a KVM_RUN lasts, if no signal ends it. `notes`: the requests that tell of memory."""

    def __init__(self, directory: Path) -> None:
        self.path = str(directory / "server")
        self.run_time = 0.0
        self.notes: list[Request] = []
        self.hellos: list[Request] = []
        self.userfaultfds: dict[int, int] = {}
        self.closed: dict[int, set[int]] = {}
        self.files: dict[int, Known] = {}
        self.run_pages: dict[int, int] = {}
        self.released = 0
        self._regs = bytes(144)
        self._lock = threading.Lock()
        self._clients = 0
        self._channels: list[socket.socket] = []
        self._memories: list[int] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(self.path)
        self._listener.listen(64)
        threading.Thread(target=self._accept, daemon=True).start()

    def environment(self, shim: Path) -> dict[str, str]:
        return os.environ | {"LD_PRELOAD": str(shim), "GUESTMEM_SOCKET": self.path}

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for channel in self._channels:
            with contextlib.suppress(OSError):
                channel.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                self._channels.append(sock)
                threading.Thread(target=Channel(self, sock).serve, daemon=True).start()

    # Files

    def _token(self, channel: Channel, kind: int) -> int:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.files[os.fstat(theirs.fileno()).st_ino] = Known(kind, channel.client, ours.detach())
        return theirs.detach()

    def _memory(self, size: int) -> tuple[int, int]:
        """Our descriptor of a new memfd, and a second open file of it for the client."""
        fd = os.memfd_create("fake")
        os.fchmod(fd, 0o600)
        os.ftruncate(fd, size)
        self._memories.append(fd)
        return fd, os.open(f"/proc/self/fd/{fd}", os.O_RDWR)

    def _run_page(self, vcpu: int) -> int:
        if vcpu not in self.run_pages:
            self.run_pages[vcpu], theirs = self._memory(3 * mmap.PAGESIZE)
            return theirs
        return os.dup(self.run_pages[vcpu])

    def _gmem(self, channel: Channel, size: int) -> int:
        ours, theirs = self._memory(size)
        self.files[os.fstat(ours).st_ino] = Known(GMEM, channel.client, ours)
        return theirs

    def _collect_released(self) -> None:
        with self._lock:
            for inode, known in list(self.files.items()):
                if known.kind != GMEM and _readable(known.fd, 0):
                    os.close(known.fd)
                    del self.files[inode]
                    self.released += 1

    # Calls

    def answer(self, channel: Channel, request: Request) -> Answer:
        if request.op == HELLO:
            return self._hello(channel, request)
        if request.op == OPEN:
            return Answer(fds=[self._token(channel, KVM if request.a == 1 else GUP_TEST)])
        if request.op == IDENTIFY:
            known = self.files.get(request.file, Known(0, 0, -1))
            return Answer(known.kind, a=known.maker)
        if request.op == IOCTL:
            return self._ioctl(channel, request)
        if request.op == RUN_FD:
            return Answer(fds=[self._run_page(request.file)])
        if request.op == VCPU_MEMORY:
            return self._vcpu_memory(request)
        if request.op == MMAP_CHECK:
            return Answer(error=EINVAL if request.c & mmap.MAP_PRIVATE else 0)
        if request.op == FALLOCATE:
            return Answer(error=EINTR if self.run_time and channel.cancelled(self.run_time) else 0)
        if request.op == STAT:
            return Answer(a=4096)
        if request.op == SYNC:
            self._collect_released()
        elif request.op == GUARD:
            self._take_userfaultfd(channel, request)
        elif request.op in (MMAP_DONE, UNMAP, MOVED, PROTECT, REMOVE):
            self.notes.append(request)
        return Answer()

    def _hello(self, channel: Channel, request: Request) -> Answer:
        self.hellos.append(request)
        with self._lock:
            self._clients += not request.c
            channel.client = request.c or self._clients
        if request.flags & HELLO_FORKED:
            self._take_userfaultfd(channel, request)
            for address in self.closed.get(request.b, set()):
                self._close_page(channel, address)
        probe = os.memfd_create("device")
        device = os.fstat(probe).st_dev
        os.close(probe)
        return Answer(channel.client, a=device, b=os.getpid())

    def _ioctl(self, channel: Channel, request: Request) -> Answer:
        number, argument = request.a, request.b
        match number:
            case 0xAE00:
                return Answer(12)
            case 0xAE01:
                return Answer(fds=[self._token(channel, VM)])
            case 0xAE41:
                return Answer(fds=[self._token(channel, VCPU)], a=1)
            case 0xC040AED4:
                return Answer(fds=[self._gmem(channel, struct.unpack_from("<Q", request.payload)[0])], a=1)
            case 0x4090AE82:
                self._regs = request.payload
                return Answer()
            case 0x8090AE81:
                return Answer(payload=self._regs)
            case 0xAE80:
                return self._run(channel, request.file)
            case _:
                return self._test_ioctl(channel, request, number, argument)

    def _run(self, channel: Channel, vcpu: int) -> Answer:
        run_page = self.run_pages.get(vcpu)
        immediate_exit = run_page is not None and os.pread(run_page, 1, 1) == b"\1"
        return Answer(error=EINTR if immediate_exit or channel.cancelled(self.run_time) else 0)

    def _vcpu_memory(self, request: Request) -> Answer:
        """A vCPU that may not run without asking, and is never told to."""
        block = new_block(bytearray(BLOCK_SIZE), 0, None)
        ours, theirs = self._memory(mmap.PAGESIZE + BLOCK_SIZE)
        os.pwrite(ours, bytes(block), mmap.PAGESIZE)
        return Answer(1, b=2, payload=os.fsencode(library_path()) + b"\0", fds=[theirs])

    def _take_userfaultfd(self, channel: Channel, request: Request) -> None:
        for fd in request.fds:
            self.userfaultfds[channel.client] = os.dup(fd)

    def _close_page(self, channel: Channel, address: int) -> int:
        """As a conversion to private closes it."""
        self.closed.setdefault(channel.client, set()).add(address)
        range_ = bytearray(struct.pack("<QQQQ", address, mmap.PAGESIZE, MISSING_AND_MINOR, 0))
        fcntl.ioctl(self.userfaultfds[channel.client], UFFDIO_REGISTER, range_)
        return channel.upcall(ZAP, payload=struct.pack("<QQ", address, mmap.PAGESIZE)).a

    def _test_ioctl(self, channel: Channel, request: Request, number: int, argument: int) -> Answer:
        page = mmap.PAGESIZE
        if number == RELEASED:
            return Answer(self.released)
        if number == NOTED:
            return Answer(len(self.notes))
        if number == HELLOS:
            return Answer(len(self.hellos))
        if number == END:
            self.close()
        if number == DELAY:
            time.sleep(argument / 1e6)
            return Answer()
        if number == READ_SUM:
            done = channel.upcall(READ, argument, 16)
            return Answer(sum(done.payload), error=done.a)
        if number == WRITE_X:
            return Answer(error=channel.upcall(WRITE, argument, payload=b"x" * 16).a)
        if number == ZAP_PAGE:
            return Answer(error=self._close_page(channel, argument))
        if number == OVERLAY_PAGE:
            return Answer(error=channel.upcall(OVERLAY, argument, page).a)
        if number == UNCOVER_PAGE:
            memory = next(known.fd for known in self.files.values() if known.kind == GMEM)
            return Answer(error=channel.upcall(UNCOVER, argument, page, 3, 0, fds=(memory,)).a)
        if number == FD_FACTS:
            done = channel.upcall(FD, argument, 1)
            for fd in done.fds:
                os.close(fd)
            return Answer(len(done.fds), error=done.a)
        return Answer(error=ENOTTY)
