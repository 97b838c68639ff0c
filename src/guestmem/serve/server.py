"""Server: the loop. Everything that happens to clients comes in here; everything they ask for runs as a task.

One thread. It alternates between the scheduler, which lets one ready task run to its next wait, and the kernel, which
says what has arrived. A vCPU gives way after each slice of about a millisecond, so nobody waits longer than that for
each vCPU that runs.
"""

from __future__ import annotations

import errno
import os
import resource
import select
import signal
import socket
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from typing import Any, TypeAlias

from guestmem.host import Host
from guestmem.iommu import DmaDevice
from guestmem.sched import Operation, Task, park
from guestmem.serve.call import Call
from guestmem.serve.channel import Channel, close_all, peer_pid
from guestmem.serve.client import Client
from guestmem.serve.files import Files, ServedFile, VcpuFile
from guestmem.serve.liveupdate import Sessions
from guestmem.serve.report import Report
from guestmem.serve.vcpu_ioctls import AT_ONCE
from guestmem.serve.wire import HELLO_FORKED, HELLO_HELPER, VERSION, CpuMode, Op, Request, pack_answer
from guestmem.trace import Refusal
from guestmem.uapi.kvm import GUEST_MEMFD_MAGIC

LOOKS = 400
"""How often the loop looks for the next event before it sleeps, where clients have another CPU: some 200 us. Clients
tend to ask again at once, and being woken costs tens of microseconds."""
_LOOKS_BEFORE_YIELD = 16

_SUCCESS = pack_answer(0)

Handler: TypeAlias = Callable[[Call], Awaitable[int]]


class Server:
    """Serves one host to any number of clients. `handlers` is the table of requests, by op."""

    def __init__(self, host: Host, handlers: dict[int, Handler], report: Report) -> None:
        self.host = host
        self.scheduler = host.scheduler
        self.report = report
        self.files = Files()
        self.sessions = Sessions(self)
        self.clients: dict[int, Client] = {}  # by number
        self.releases = 0
        self._handlers = handlers
        self._calls: dict[Task[Any], Call] = {}
        self._poll = select.epoll()
        self._ready: dict[int, Callable[[], None]] = {}
        self._listener: socket.socket | None = None
        self.vms_created = 0
        self.cpu_mode = CpuMode.PARALLEL  # of vCPUs that run in clients
        self.dma_devices: dict[int, DmaDevice] = {}  # by the number of their file
        self.looks = LOOKS if len(os.sched_getaffinity(0)) > 1 else 0
        self._tokens: set[int] = set()
        self._next_client = 1
        self.scheduler.spawn(_never(), "event loop")
        self.watch(self.files.views.inotify, self._gmems_closed)

    # The loop

    def listen(self, path: str, replace: bool = False) -> None:
        """Take connections at a socket path; with `replace` one of a server that is no more is taken away. Raises:
        OSError."""
        if replace and not _is_served(path):
            with suppress(FileNotFoundError):
                os.unlink(path)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.setblocking(False)
        self._listener.bind(path)
        self._listener.listen(128)
        self.watch(self._listener.fileno(), self._accept)

    def watch(self, fd: int, on_ready: Callable[[], None]) -> None:
        """Call `on_ready` when `fd` can be read or has ended."""
        self._ready[fd] = on_ready
        self._poll.register(fd, select.EPOLLIN)

    def unwatch(self, fd: int) -> None:
        del self._ready[fd]
        self._poll.unregister(fd)

    def run(self, until: Callable[[], bool]) -> None:
        """Serve until `until()` is true, which is asked after every event. Clients are started before this."""
        _allow_many_descriptors()
        step, poll, ready = self.scheduler.step, self._poll.poll, self._ready
        views, doubtful = self.files.views, self.files.views.doubtful
        while not until():
            for fd, _ in poll(0) if step() else self._next_events():
                on_ready = ready.get(fd)
                if on_ready is not None:
                    on_ready()
            if doubtful:
                self._release_all(views.look_again())

    def _next_events(self) -> list[tuple[int, int]]:
        """What happens next: looked for a while, then slept for."""
        poll = self._poll.poll
        for look in range(self.looks):
            events = poll(0)
            if events:
                return events
            if look % _LOOKS_BEFORE_YIELD == 0:
                os.sched_yield()  # a client may be waiting for this very CPU
        return poll(self.files.views.nap_ms())

    def stop(self) -> None:
        """Kill what is under way: from now on nothing changes. Idempotent."""
        for client in self.clients.values():
            client.end()
        self.scheduler.close()

    def kill_clients(self) -> None:
        """End every process that is connected, and wait until it has ended: private memory is guarded no more when this
        server is not there. As a kexec does."""
        for pid in {client.pid for client in self.clients.values() if any(c.is_connected() for c in client.channels)}:
            with suppress(ProcessLookupError):
                process = os.pidfd_open(pid)
                signal.pidfd_send_signal(process, signal.SIGKILL)
                select.select([process], [], [])
                os.close(process)

    def close(self) -> None:
        """Kill what is under way and let go of every client."""
        self.stop()
        for file in list(self.files.by_inode.values()):
            self.files.remove(file)
            self.scheduler.run(self._run_release(file), "release")
        if self._listener is not None:
            self._listener.close()
        self._poll.close()
        self.files.close()
        self.host.close()

    @property
    def busy(self) -> bool:
        """Whether some client is connected or has a file open."""
        return bool(self.files.by_inode) or any(client.channels for client in self.clients.values())

    # Tasks

    def current_call(self) -> Call | None:
        """The call that the running task works on."""
        return self._calls.get(self.scheduler.current) if self.scheduler.current is not None else None

    def _begin(self, call: Call, handler: Handler) -> None:
        self.scheduler.begin(self._serve(call, handler), "call")

    async def serve(self, call: Call) -> None:
        """Work on a request of a thread that has no channel; its `answer` gets the answer."""
        await self._serve(call, self._handlers[call.request.op])

    async def _serve(self, call: Call, handler: Handler) -> None:
        task = self.scheduler.current
        assert task is not None
        self._calls[task] = call
        call.channel.task = task
        self.report.count(call.request)
        if call.file is not None:
            call.file.calls += 1
        error = 0
        try:
            value = await handler(call)
        except Refusal as refusal:
            error = refusal.errno or errno.EIO
            self.report.refused(call, refusal)
        except Exception as bug:  # must not take the other clients along
            error = errno.EIO
            self.report.failed(call, bug)
        finally:
            call.channel.task = None
            del self._calls[task]
        if error:
            call.refuse(error)
        else:
            call.answer(value)
        if call.file is not None:
            call.file.calls -= 1
            if call.file.closed and not call.file.calls:
                await self._run_release(call.file)

    # Clients

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return  # it went away before we came
        channel = Channel(sock, self._on_request)
        self.watch(sock.fileno(), lambda: self._on_readable(channel))

    def _on_readable(self, channel: Channel) -> None:
        if not channel.receive():
            self._on_closed(channel)

    def _on_closed(self, channel: Channel) -> None:
        self.unwatch(channel.sock.fileno())
        channel.close()
        client = channel.client
        if client is None:
            return
        client.channels.discard(channel)
        if channel is client.helper or not _lives(client.pid):
            client.end()

    def _on_request(self, channel: Channel, request: Request, fds: list[int]) -> None:
        if request.op == Op.HELLO:
            self._hello(channel, request, fds)
            return
        if request.op == Op.IOCTL and channel.task is None and self._done_at_once(channel, request):
            return
        client, handler = channel.client, self._handlers.get(request.op)
        if client is None or handler is None or channel.task is not None:
            channel.answer(pack_answer(-1, errno.EPROTO), [])
        else:
            if request.op == Op.SYNC:
                self.notice_releases()
            if request.op == Op.GUARD and fds:
                client.use_userfaultfd(fds.pop(0))
            file = self.files.get(request.file) if request.file else None
            self._begin(Call(self, channel, client, request, file), handler)
        close_all(fds)

    def _done_at_once(self, channel: Channel, request: Request) -> bool:
        """Whether a call could be done without a task, as those that VMMs make all the time mostly can."""
        at_once = AT_ONCE.get(request.a)
        if at_once is None:
            return False
        file = self.files.by_inode.get(request.file)
        if type(file) is not VcpuFile or file.owner is not channel.client or file.vcpu.kvm.dead:
            return False
        try:
            payload = at_once(file, request.b)
        except Exception as bug:  # must not take the other clients along
            self.report.bug("vCPU", bug)
            channel.answer(pack_answer(-1, errno.EIO), [])
            return True
        if payload is None:
            return False
        self.report.count(request)
        channel.answer(_SUCCESS + payload, [])
        return True

    def _hello(self, channel: Channel, request: Request, fds: list[int]) -> None:
        """A thread introduces itself, with the number of its client if it has been given one."""
        pid = peer_pid(channel.sock)
        if request.a != VERSION or channel.client is not None:
            channel.answer(pack_answer(-1, errno.EPROTO), [])
            close_all(fds)
            return
        client = self.clients.get(request.c)
        if client is None or not client.alive or client.pid != pid:
            client = self.new_client(pid)
        channel.client = client
        client.channels.add(channel)
        if request.flags & HELLO_HELPER:
            client.helper = channel
        if fds:
            client.use_userfaultfd(fds.pop(0))
        close_all(fds)
        self._begin(Call(self, channel, client, request, None), self._welcome)

    def new_client(self, pid: int, kind: type[Client] = Client) -> Client:
        """A process that we have not seen, or one whose memory is new since: it has called exec."""
        for former in [client for client in self.clients.values() if client.pid == pid]:
            former.end()
        client = kind(self, self._next_client, pid)
        self._next_client += 1
        self.clients[client.number] = client
        self.report.client(client)
        return client

    async def _welcome(self, call: Call) -> int:
        request = call.request
        parent = self.clients.get(request.b)
        if request.flags & HELLO_FORKED and parent is not None and parent is not call.client:
            await call.client.memory.fork_of(parent.memory)
        call.a = self.files.gmem_device
        call.b = os.getpid()
        call.c = GUEST_MEMFD_MAGIC if self.host.level.own_file_system else 0
        return call.client.number

    # Releases

    def add_token(self, file: ServedFile) -> int:
        """A new open file for a client; the descriptor to give away."""
        ours, theirs = self.files.add_token(file)

        def closed() -> None:
            self.unwatch(ours.fileno())
            self._tokens.discard(ours.fileno())
            ours.close()
            self._release(file)

        self._tokens.add(ours.fileno())
        self.watch(ours.fileno(), closed)
        return theirs

    def _gmems_closed(self) -> None:
        self._release_all(self.files.views.closed())

    def _release_all(self, files: Iterable[ServedFile]) -> None:
        for file in files:
            self._release(file)

    def _release(self, file: ServedFile) -> None:
        """The last descriptor is gone; a call that is under way is the last to let go."""
        self.files.remove(file)
        self.report.closed(file)
        file.closed = True
        if not file.calls:
            self.scheduler.begin(self._run_release(file), "release")

    async def _run_release(self, file: ServedFile) -> None:
        self.releases += 1
        try:
            await file.release()
            self.report.released(file)
            if file.owner is not None:
                file.owner.memory.close_if_nobody_runs()
        except Exception as bug:  # must not take the other clients along
            self.report.bug("release", bug)
        finally:
            self.releases -= 1

    def notice_releases(self) -> None:
        """Take note of the descriptors that have been closed up to now."""
        for fd, _ in self._poll.poll(0):
            if fd in self._tokens or fd == self.files.views.inotify:
                self._ready[fd]()
        self._release_all(self.files.views.look_at_all())

    async def sync(self) -> None:
        """Wait until every release that has been noticed is done."""
        await park(Operation("sync", "releases", lambda: not self.releases))


def _allow_many_descriptors() -> None:
    """Every file of every client has a descriptor here. The clients' own limit, which they inherited, stays."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def _never() -> None:
    """Parked for ever, so that a running vCPU always finds somebody to give way to: the loop."""
    await park(Operation("wait", "events", lambda: False))


def _is_served(path: str) -> bool:
    """Whether somebody listens at a socket path."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        return probe.connect_ex(path) == 0


def _lives(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")
