"""/dev/liveupdate: sessions of files that outlive this server. Preserve, freeze, retrieve, finish.

A client makes a session and preserves in it the VM and its guest_memfds, each under a token. While the session is open
they stay as they are (`kvm.preserve`). When the server is told to stop with sessions open, they are handed over
(`handover`); the clients are not. A client of the next server retrieves the session by its name and each file by its
token, links nothing and moves nothing: the VM has the identity of before and the memory belongs to it.

Closing a session that was made here gives its files back to what they were; closing one that was retrieved finishes it:
what nobody has retrieved from it is gone.

Source: kernel/liveupdate/luo_core.c, luo_session.c, luo_file.c; Documentation/userspace-api/liveupdate.rst.
"""

from __future__ import annotations

import errno
import os
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

from guestmem.kvm import preserve
from guestmem.kvm.identity import Identity, VirtualMachine
from guestmem.kvm.preserve import GmemRecord, VmRecord
from guestmem.kvm.vm import Kvm
from guestmem.serve.files import GmemFile, ServedFile, VmFile
from guestmem.serve.wire import FD_IN_ARGUMENT, FileKind
from guestmem.trace import Refusal
from guestmem.uapi import liveupdate as uapi
from guestmem.uapi.kvm import VmType

if TYPE_CHECKING:
    from guestmem.serve.call import Call
    from guestmem.serve.client import Client
    from guestmem.serve.server import Server


class Stored(NamedTuple):
    """What came from the server before: a record, and the memory of a guest_memfd."""

    record: VmRecord | GmemRecord
    memfd: int | None


class Session:
    """`preserved` are files of this server, held; `stored` what came from the one before and is not retrieved yet.

    `machines` are the identities that came with it, held; `vms` the struct kvm that were retrieved, held.
    """

    def __init__(self, server: Server, name: str) -> None:
        self.server = server
        self.name = name
        self.preserved: dict[int, VmFile | GmemFile] = {}
        self.stored: dict[int, Stored] = {}
        self.tokens: set[int] = set()
        self.machines: dict[Identity, VirtualMachine] = {}
        self.vms: dict[Identity, Kvm] = {}
        self.incoming = False
        self.is_open = False
        self.handed_over = False

    # Of this server

    async def preserve(self, token: int, file: ServedFile | int) -> None:
        """Raises: Refusal EEXIST `preserve.token`; ENOENT `preserve.not_ours`; EINVAL `preserve.vm_first`; as
        preserve_vm and preserve_gmem."""
        if token in self.preserved:
            raise Refusal(errno.EEXIST, "preserve.token", token=token)
        match file:
            case VmFile():
                preserve.preserve_vm(file.kvm)
                file.kvm.get()
            case GmemFile():
                self._check_vm_preserved(file)
                await preserve.preserve_gmem(file.file)
                file.file.get()
                await file.mappings.freeze()
            case _:
                raise Refusal(errno.ENOENT, "preserve.not_ours", token=token)
        self.preserved[token] = file

    def _check_vm_preserved(self, gmem: GmemFile) -> None:
        context = gmem.file.private_data
        vms = [file.kvm for file in self.preserved.values() if isinstance(file, VmFile)]
        if getattr(context, "kvm", None) not in vms:
            raise Refusal(errno.EINVAL, "preserve.vm_first", inode=gmem.file.inode.number)

    async def unpreserve(self) -> None:
        """Everything is as if it had never been preserved."""
        for file in reversed(list(self.preserved.values())):
            if isinstance(file, VmFile):
                preserve.unpreserve_vm(file.kvm)
                await file.kvm.put()
            else:
                await preserve.unpreserve_gmem(file.file)
                await file.mappings.thaw()
                await file.file.put()
        self.preserved.clear()

    def records(self) -> dict[int, Stored]:
        """What is to be handed over, once nothing runs any more. The descriptors stay ours."""
        found = dict(self.stored)
        for token, file in self.preserved.items():
            if isinstance(file, VmFile):
                found[token] = Stored(preserve.record_vm(file.kvm), None)
            else:
                found[token] = Stored(preserve.record_gmem(file.file), file.mappings.backing_fd)
        return found

    # From the server before

    def adopt(self, stored: dict[int, Stored]) -> None:
        """Raises: Refusal EBUSY `identity.taken`."""
        host = self.server.host
        self.incoming = True
        self.stored = stored
        self.tokens = set(stored)
        for record, _ in stored.values():
            if isinstance(record, VmRecord):
                host.identities.adopt(record.identity)
                platform = host.platforms[VmType.DEFAULT]  # memory with an architecture's tables is not preserved
                self.machines[record.identity] = VirtualMachine(
                    host.scheduler, host.identities, platform, identity=record.identity
                )

    async def retrieve(self, call: Call, token: int) -> None:
        """Raises: Refusal ENOENT `retrieve.token`; EBUSY `retrieve.twice`; EINVAL `retrieve.vm_first`."""
        if token not in self.tokens:
            raise Refusal(errno.ENOENT, "retrieve.token", token=token)
        if token not in self.stored:
            raise Refusal(errno.EBUSY, "retrieve.twice", token=token)
        record, memfd = self.stored[token]
        if isinstance(record, VmRecord):
            self._retrieve_vm(call, record)
        else:
            await self._retrieve_gmem(call, record, memfd)
        del self.stored[token]

    def _retrieve_vm(self, call: Call, record: VmRecord) -> None:
        server, machine = self.server, self.machines[record.identity]
        machine.get()
        host = server.host
        server.vms_created += 1
        kvm = Kvm(
            host.environment,
            server.vms_created,
            VmType(record.vm_type),
            host.level,
            call.client.memory,
            machine,
        )
        kvm.get()
        self.vms[record.identity] = kvm
        call.give(server.add_token(VmFile(call.client, kvm)))

    async def _retrieve_gmem(self, call: Call, record: GmemRecord, memfd: int | None) -> None:
        kvm = self.vms.get(record.identity)
        if kvm is None or memfd is None or kvm.machine.identity != record.identity:
            raise Refusal(errno.EINVAL, "retrieve.vm_first", number=record.number)
        inode = self.server.host.new_inode(
            size=record.size, abilities=preserve.abilities_of(record), owner=kvm.machine, memfd=os.dup(memfd)
        )
        file = GmemFile(call.client, await preserve.restore_gmem(kvm, inode, record))
        call.give(self.server.files.add_gmem(file, adopted=True), keep_on_exec=True)
        os.close(memfd)

    async def finish(self) -> None:
        """What was not retrieved is gone."""
        for _, memfd in self.stored.values():
            if memfd is not None:
                os.close(memfd)
        self.stored.clear()
        for kvm in self.vms.values():
            await kvm.put()
        self.vms.clear()
        for machine in self.machines.values():
            machine.put()
        self.machines.clear()


class Sessions:
    """Those that were made here, and those that came, by name. `device_open`: only one may have /dev/liveupdate."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.outgoing: dict[str, Session] = {}
        self.incoming: dict[str, Session] = {}
        self.device_open = False

    def open_device(self, client: Client) -> LiveUpdateFile:
        """Raises: Refusal EBUSY `liveupdate.open`."""
        if self.device_open:
            raise Refusal(errno.EBUSY, "liveupdate.open")
        self.device_open = True
        return LiveUpdateFile(client, self)

    def create(self, name: str) -> Session:
        """Raises: Refusal EEXIST `liveupdate.exists`."""
        if name in self.outgoing:
            raise Refusal(errno.EEXIST, "liveupdate.exists", name=name)
        session = self.outgoing[name] = Session(self._server, name)
        return session

    def retrieve(self, name: str) -> Session:
        """Raises: Refusal ENOENT `liveupdate.no_session`; EINVAL `liveupdate.retrieved`."""
        session = self.incoming.get(name)
        if session is None:
            raise Refusal(errno.ENOENT, "liveupdate.no_session", name=name)
        if session.is_open:
            raise Refusal(errno.EINVAL, "liveupdate.retrieved", name=name)
        session.is_open = True
        return session

    def adopt(self, name: str, stored: dict[int, Stored]) -> None:
        """A session of the server before. Raises: Refusal EBUSY `identity.taken`."""
        session = Session(self._server, name)
        session.adopt(stored)
        self.incoming[name] = session

    async def closed(self, session: Session) -> None:
        """Its last descriptor is gone."""
        if session.handed_over:
            return
        if session.incoming:
            await session.finish()
            del self.incoming[session.name]
        else:
            await session.unpreserve()
            del self.outgoing[session.name]


class LiveUpdateFile(ServedFile):
    """/dev/liveupdate."""

    kind = FileKind.LIVE_UPDATE

    def __init__(self, owner: Client, sessions: Sessions) -> None:
        super().__init__(owner)
        self._sessions = sessions

    async def release(self) -> None:
        self._sessions.device_open = False

    async def ioctl(self, call: Call, request: int, argument: int) -> int:
        """Raises: Refusal ENOTTY `ioctl.unknown`; EINVAL `liveupdate.size`, `liveupdate.name`; as Sessions."""
        if request not in (uapi.LIVEUPDATE_IOCTL_CREATE_SESSION, uapi.LIVEUPDATE_IOCTL_RETRIEVE_SESSION):
            raise Refusal(errno.ENOTTY, "ioctl.unknown", request=request, on="/dev/liveupdate")
        _, _, raw = await _copy(call, argument, uapi.SESSION)
        name, end, _ = raw.partition(b"\0")
        if not name or not end:
            raise Refusal(errno.EINVAL, "liveupdate.name", length=len(name))
        make = self._sessions.create if request == uapi.LIVEUPDATE_IOCTL_CREATE_SESSION else self._sessions.retrieve
        session = make(name.decode("latin-1"))
        call.give(call.server.add_token(SessionFile(call.client, self._sessions, session)))
        call.a |= FD_IN_ARGUMENT
        return 0


class SessionFile(ServedFile):
    """A session."""

    kind = FileKind.SESSION

    def __init__(self, owner: Client, sessions: Sessions, session: Session) -> None:
        super().__init__(owner)
        self._sessions = sessions
        self.session = session

    async def release(self) -> None:
        await self._sessions.closed(self.session)

    async def ioctl(self, call: Call, request: int, argument: int) -> int:
        """Raises: Refusal ENOTTY `ioctl.unknown`; EINVAL `liveupdate.size`, `liveupdate.direction`; EOPNOTSUPP
        `liveupdate.reserved`; EBADF `fd.not_open`; as Session."""
        match request:
            case uapi.LIVEUPDATE_SESSION_PRESERVE_FD:
                _, fd, token = await _copy(call, argument, uapi.SESSION_FD)
                self._check(incoming=False)
                await self.session.preserve(token, await call.descriptor(fd))
            case uapi.LIVEUPDATE_SESSION_RETRIEVE_FD:
                _, _, token = await _copy(call, argument, uapi.SESSION_FD)
                self._check(incoming=True)
                await self.session.retrieve(call, token)
                call.a |= FD_IN_ARGUMENT
            case uapi.LIVEUPDATE_SESSION_FINISH:
                _, reserved = await _copy(call, argument, uapi.SESSION_FINISH)
                if reserved:
                    raise Refusal(errno.EOPNOTSUPP, "liveupdate.reserved", reserved=reserved)
                self._check(incoming=True)
                await self.session.finish()
            case _:
                raise Refusal(errno.ENOTTY, "ioctl.unknown", request=request, on="session")
        return 0

    def _check(self, incoming: bool) -> None:
        if self.session.incoming is not incoming:
            raise Refusal(errno.EINVAL, "liveupdate.direction", incoming=self.session.incoming)


async def _copy(call: Call, argument: int, layout: struct.Struct) -> tuple[Any, ...]:
    memory = call.client.memory
    (size,) = struct.unpack("<I", await memory.copy_from_user(argument, 4))
    if size != layout.size:
        raise Refusal(errno.EINVAL, "liveupdate.size", size=size, expected=layout.size)
    return layout.unpack(await memory.copy_from_user(argument, layout.size))
