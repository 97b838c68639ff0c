"""Call: one request of a client while it is being worked on, and what goes back with its answer."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any, NamedTuple

from guestmem.kvm.vm import Kvm
from guestmem.memory import File
from guestmem.serve.channel import ClientGone
from guestmem.serve.client_thread import ClientThread
from guestmem.serve.files import GmemFile, ServedFile, VmFile
from guestmem.serve.wire import KEEP_ON_EXEC, Op, Request, Upcall, pack_answer
from guestmem.trace import Refusal

if TYPE_CHECKING:
    from guestmem.serve.client import Client
    from guestmem.serve.client_memory import ClientMemory
    from guestmem.serve.server import Server

_O_PATH = 0o10000000
_IOC_READ = 2


class Call:
    """A request and its circumstances. `client` makes it, `file` is what it is made on (None if it names none)."""

    __slots__ = (
        "_argument_size",
        "_written",
        "a",
        "b",
        "c",
        "channel",
        "client",
        "fds",
        "file",
        "request",
        "server",
    )

    def __init__(
        self, server: Server, channel: ClientThread, client: Client, request: Request, file: ServedFile | None
    ) -> None:
        self.server = server
        self.channel = channel
        self.client = client
        self.request = request
        self.file = file
        self.fds: list[int] = []
        self.a = self.b = self.c = 0
        self._argument_size = 0
        self._written: bytearray | None = None

    @property
    def kvm(self) -> Kvm:
        """The VM of a call that is made on one."""
        assert isinstance(self.file, VmFile)
        return self.file.kvm

    # The argument of an ioctl, which came with the request and goes back with the answer

    def begin_ioctl(self, size: int, direction: int) -> None:
        """From now on the bytes at the ioctl's argument are those of the request."""
        self._argument_size = size if direction & _IOC_READ else 0

    def argument_bytes(self, hva: int, size: int) -> bytes | None:
        """`size` bytes at `hva`, if the request brought them."""
        if self.request.op != Op.IOCTL:
            return None
        start = hva - self.request.b
        payload = self._written or self.request.payload
        if start < 0 or start + size > len(payload):
            return None
        return bytes(payload[start : start + size])

    def put_argument_bytes(self, hva: int, data: bytes) -> bool:
        """Have `data` written at `hva` with the answer; False if it is not inside the ioctl's argument."""
        start = hva - self.request.b
        if start < 0 or start + len(data) > self._argument_size:
            return False
        if self._written is None:
            self._written = bytearray(self.request.payload.ljust(self._argument_size, b"\0"))
        self._written[start : start + len(data)] = data
        return True

    # Descriptors

    def give(self, fd: int, keep_on_exec: bool = False) -> int:
        """The call's result is a new descriptor of the client; `fd` is ours and goes with the answer."""
        self.fds.append(fd)
        if keep_on_exec:
            self.a |= KEEP_ON_EXEC
        return 0

    async def descriptor(self, number: int) -> ServedFile | int:
        """What a descriptor number of the client refers to: a file of ours, or 0 for another open file.

        Raises: Refusal EBADF `fd.not_open`, as for an O_PATH descriptor.
        """
        inode, flags, _ = await self._look_up(number, take=False)
        if flags & _O_PATH:
            raise not_open(number)
        return self.server.files.get(inode) or 0

    async def take_descriptor(self, number: int) -> int:
        """A duplicate of a descriptor of the client, now ours to close. Raises: Refusal EBADF `fd.not_open`."""
        _, _, fds = await self._look_up(number, take=True)
        return fds[0]

    async def _look_up(self, number: int, take: bool) -> tuple[int, int, list[int]]:
        try:
            result = await self.client.upcall(Upcall.FD, a=number & 0xFFFF_FFFF, b=take)
        except ClientGone:
            raise not_open(number) from None
        if result.error or len(result.payload) < 24 or (take and not result.fds):
            for fd in result.fds:
                os.close(fd)
            raise not_open(number)
        _, inode, flags = (int.from_bytes(result.payload[at : at + 8], "little") for at in (0, 8, 16))
        return inode, flags, result.fds

    # The answer

    def answer(self, value: int) -> None:
        payload = bytes(self._written or b"")
        self.channel.answer(pack_answer(value, 0, payload, self.a, self.b, self.c), self.fds)

    def refuse(self, error: int) -> None:
        """An errno. What was written to the argument goes back all the same; descriptors do not."""
        for fd in self.fds:
            os.close(fd)
        payload = bytes(self._written or b"")
        self.channel.answer(pack_answer(-1, error, payload), [])

    def __repr__(self) -> str:
        return f"{Op(self.request.op).name.lower()} of {self.client.pid}"


class KvmCaller(NamedTuple):
    """See kvm.ioctl.Caller."""

    mm: ClientMemory
    fds: CallFiles


class CallFiles:
    """The descriptors of a call's client as `kvm` asks for them. What it may ask for was looked up before (`known`)."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self.known: dict[int, object] = {}

    async def look_up(self, number: int) -> None:
        """Find out what a number refers to, for a later `get`. What it raises, `get` raises."""
        try:
            found = await self._call.descriptor(number)
        except Refusal as refusal:
            self.known[number] = refusal
        else:
            self.known[number] = _what_kvm_knows(found)

    async def look_up_to_link(self, number: int) -> None:
        """As `look_up`; and if it is a guest_memfd, have its open file told apart from others of the same memory."""
        await self.look_up(number)
        found = self.known[number]
        if isinstance(found, File):
            try:
                fd = await self._call.take_descriptor(number)
            except Refusal as refusal:
                self.known[number] = refusal
                return
            try:
                self._call.server.files.lock_view(fd)
            finally:
                os.close(fd)

    def get(self, fd: int) -> Any:
        found = self.known[fd]
        if isinstance(found, Refusal):
            raise found
        return found

    def reserve(self) -> int:
        """The number is the client's to choose: its table may be full, which it finds out when the answer comes."""
        return 0

    def unreserve(self, fd: int) -> None:
        """See `reserve`."""

    def install(self, fd: int, file: File) -> None:
        """Open a new guest_memfd for the client. It survives exec: the real one has no close-on-exec either."""
        served = GmemFile(self._call.client, file)
        self._call.give(self._call.server.files.add_gmem(served), keep_on_exec=True)


def not_open(number: int) -> Refusal:
    return Refusal(errno.EBADF, "fd.not_open", fd=number)


def _what_kvm_knows(found: ServedFile | int) -> object:
    match found:
        case GmemFile():
            return found.file
        case VmFile():
            return found.kvm
        case _:
            return found
