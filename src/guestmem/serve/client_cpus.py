"""vCPUs that run in their client: in the thread that calls KVM_RUN, on the client's own memory (native/vcpus.c).

    KVM_RUN -> ENTER, with the leaf that it missed -> guest code -> a stop -> KVM handles it -> ENTER ... -> the answer

`ClientCpu` is such a vCPU as KVM has it, an engine; `ClientCpus` are those of one VM, with the leaves that their
process has of its stage 2. A leaf of a memslot's own memory is the client's address. One of a guest_memfd points into
an alias: a mapping of the file that the client does not know, registered with its userfaultfd and opened page by page.
So what the server closes no vCPU reaches, whatever it has cached: the touch is a SIGBUS in it, which is a stop like a
miss.

A leaf may be on its way when a zap takes it back. Each ENTER says of which generation its leaves are, each DROP begins
one; the client installs no leaf of a former generation.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
from typing import TYPE_CHECKING, NamedTuple

from guestmem.cpu.block import BLOCK_SIZE, BlockState, new_block, read_stop
from guestmem.cpu.engine import GuestMemory, HostFault, Left, RemoteEngine, SliceOver, Stage2Miss, Stop, Translation
from guestmem.kvm.addresses import Gfn, gfn_of
from guestmem.kvm.stage2 import USER_MEMORY, Leaf
from guestmem.kvm.vm import Kvm
from guestmem.memory import PAGE_SHIFT, PAGE_SIZE, Access, Inode, MemfdBacking, Range
from guestmem.memory.backing import WINDOW_SHIFT
from guestmem.memory.huge_backing import HugetlbBacking
from guestmem.sched import Operation, park
from guestmem.serve.channel import ClientGone
from guestmem.serve.wire import STOP_LEFT, Upcall
from guestmem.trace import Refusal

if TYPE_CHECKING:
    from guestmem.serve.client import Client
    from guestmem.serve.files import VcpuFile

_ENTER = struct.Struct("<QQQ")  # vCPU, generation, leaves
_LEAF = struct.Struct("<QQQII")  # gfn, count, hva, kinds, flags
_WRITABLE, _MMIO = 1, 2
_DROP = struct.Struct("<QQII")  # VM, generation, ranges of frames, ranges of addresses
_FRAMES = struct.Struct("<QQII")  # gfn, count, kinds, 0
_ZAP = struct.Struct("<QQ")  # address, length
_KINDS = {Access.SHARED: 1, Access.PRIVATE: 2}
_BOTH_KINDS = 3
_DROPS_MAX = 1000  # of one message

_PAGE = struct.Struct("<IIQ")  # direct, 0, direct_exits
_DIRECT_EXITS_AT = 8


class Alias(NamedTuple):
    """The client's mapping of one window of a guest_memfd's backing, at `base`. One of hugetlb is not `guarded` but
    always open: vCPUs let go of it when they are told, and no page of it leaves the file."""

    inode: Inode
    fd: int
    base: int
    size: int
    file_offset: int
    guarded: bool


class ClientCpus:
    """The vCPUs of one VM in the process that made it: RemoteTlbs of its stage 2."""

    def __init__(self, client: Client, kvm: Kvm) -> None:
        self.client = client
        self.kvm = kvm
        self.generation = 0
        self._aliases: dict[int, Alias] = {}  # by the server's address of the window
        self._frames: list[tuple[int, int, int]] = []  # dropped and not flushed
        self._zaps: list[tuple[int, int]] = []
        self._flushed = 0  # the generation up to which the client has dropped

    # RemoteTlbs

    def drop(self, gfns: Range[Gfn], accesses: tuple[Access, ...]) -> None:
        """See RemoteTlbs. What is shown by a guest_memfd is closed in its alias, too."""
        self.generation += 1
        kinds = sum(_KINDS[access] for access in accesses)
        self._frames.append((gfns.start, gfns.pages, kinds))
        for slot in self.kvm.memslots.overlapping(gfns):
            inside = slot.gfns.intersection(gfns)
            if slot.context is None or inside is None:
                continue
            first = slot.index_of(inside.start)
            self._close(slot.context.inode, first << PAGE_SHIFT, inside.pages << PAGE_SHIFT)

    def _close(self, inode: Inode, start: int, size: int) -> None:
        for alias in self._aliases.values():
            low, high = max(start, alias.file_offset), min(start + size, alias.file_offset + alias.size)
            if alias.guarded and alias.inode is inode and low < high:
                self._zaps.append((alias.base + low - alias.file_offset, high - low))

    async def flush(self) -> None:
        """See RemoteTlbs."""
        target = self.generation
        if self._frames or self._zaps:
            frames, self._frames, zaps, self._zaps = self._frames, [], self._zaps, []
            await self._send(target, frames, zaps)
            self._flushed = max(self._flushed, target)
        if not self._has_flushed(target):  # who took the last ones has not come back yet
            await park(Operation("remote flush", self.kvm.number, lambda: self._has_flushed(target)))

    def _has_flushed(self, generation: int) -> bool:
        return self._flushed >= generation or not self.client.alive

    async def _send(self, generation: int, frames: list[tuple[int, int, int]], zaps: list[tuple[int, int]]) -> None:
        while frames or zaps:
            some, frames = frames[:_DROPS_MAX], frames[_DROPS_MAX:]
            few, zaps = zaps[:_DROPS_MAX], zaps[_DROPS_MAX:]
            payload = _DROP.pack(self.kvm.number, generation, len(some), len(few))
            payload += b"".join(_FRAMES.pack(*each, 0) for each in some)
            payload += b"".join(_ZAP.pack(*each) for each in few)
            try:
                await self.client.upcall(Upcall.DROP, payload)
            except ClientGone:
                return

    async def forget(self, inode: Inode) -> None:
        """See RemoteTlbs. An alias would keep the memory of a file that is closed."""
        for window in [window for window, alias in self._aliases.items() if alias.inode is inode]:
            alias = self._aliases.pop(window)
            try:
                await self.client.upcall(Upcall.UNALIAS, a=alias.base, b=alias.size)
            except ClientGone:
                return

    def review(self) -> None:
        """Something of the VM has changed that its vCPUs may have to ask about."""
        for vcpu in self.kvm.vcpus.values():
            if isinstance(vcpu.engine, ClientCpu):
                vcpu.engine.allow_direct()

    # Leaves

    def leaf_of(self, gfn: Gfn, private: bool | None) -> tuple[Access, Leaf]:
        """The leaf that a translation has just come from, and the kind that it is of."""
        tables = self.kvm.stage2.tables
        access = Access.PRIVATE if private else Access.SHARED
        leaf = tables[access].lookup(gfn)
        if leaf is None and private is None:
            access, leaf = Access.PRIVATE, tables[Access.PRIVATE].lookup(gfn)
        assert leaf is not None
        return access, leaf

    async def place(self, found: Translation, gpa: int) -> int:
        """The client's address of a page that stage 2 maps, open to its vCPUs. Raises: Refusal ENOMEM `vcpu.alias`."""
        if found.window == USER_MEMORY:
            return found.hva
        alias = self._aliases.get(found.window.base) or await self._make_alias(found, gpa)
        hva = alias.base + found.hva - found.window.base
        self.open(alias, hva)
        return hva

    def open(self, alias: Alias, hva: int) -> None:
        """Let the process reach one page of an alias."""
        if alias.guarded:
            self.client.guard.open_alias(alias.fd, hva, alias.file_offset + hva - alias.base)

    def alias_at(self, hva: int) -> Alias | None:
        return next((a for a in self._aliases.values() if a.base <= hva < a.base + a.size), None)

    async def _make_alias(self, found: Translation, gpa: int) -> Alias:
        slot = self.kvm.memslots.find(gfn_of(gpa))
        assert slot is not None and slot.context is not None
        inode = slot.context.inode
        backing = inode.backing
        assert isinstance(backing, MemfdBacking)
        base, size = found.window
        offset = slot.index_of(gfn_of(gpa)) << PAGE_SHIFT >> WINDOW_SHIFT << WINDOW_SHIFT
        try:
            result = await self.client.upcall(Upcall.ALIAS, a=offset, b=size, fds=(backing.memory_fd,))
        except ClientGone:
            raise Refusal(errno.EINTR, "run.interrupted", vm=self.kvm.number) from None
        if result.error:
            raise Refusal(errno.ENOMEM, "vcpu.alias", vm=self.kvm.number, size=size, host_errno=result.error)
        guarded = not isinstance(backing, HugetlbBacking)
        alias = Alias(inode, backing.memory_fd, result.value, size, offset, guarded)
        if guarded:
            self.client.guard.cover_alias(alias.base, alias.size)
        self._aliases[base] = alias
        return alias

    def close(self) -> None:
        """The VM is no more: its vCPUs' memory in the client goes, by itself."""
        server = self.client.server
        if self.client.alive and self.client.helper is not None:
            server.scheduler.spawn(self._forget_all(), "vCPUs forgotten")

    async def _forget_all(self) -> None:
        try:
            await self.client.upcall(Upcall.FORGET, a=self.kvm.number)
            for alias in self._aliases.values():
                await self.client.upcall(Upcall.UNALIAS, a=alias.base, b=alias.size)
        except ClientGone:
            pass


class ClientCpu(BlockState, RemoteEngine):
    """One vCPU in its client. `fd` is the memory that it shares: a page of ours, then the CPU's block.
    `came_with_stop`: a KVM_RUN that began without asking has brought one along. `inside`: we have sent it in."""

    def __init__(self, cpus: ClientCpus, memory: GuestMemory) -> None:
        self.fd = os.memfd_create("guestmem:vcpu", os.MFD_CLOEXEC)
        size = PAGE_SIZE + -(-BLOCK_SIZE // PAGE_SIZE) * PAGE_SIZE
        os.ftruncate(self.fd, size)
        self._shared = mmap.mmap(self.fd, size)
        super().__init__(new_block(self._shared, PAGE_SIZE, memory.page_bit), memory.page_bit)
        self.cpus = cpus
        self.file: VcpuFile | None = None
        self.inside = False
        self.came_with_stop = False
        self._memory = memory
        self._missed: Stage2Miss | None = None
        self._mmio: list[bytes] = []
        self._leaf_generation = 0

    # RemoteEngine

    async def enter(self) -> Stop:
        """See RemoteEngine. Raises: Refusal ENOMEM `vcpu.alias`, `vcpu.leaves`."""
        while True:
            stop = await self._next_stop()
            if isinstance(stop, HostFault):
                stop = self._fault(stop)
            if not isinstance(stop, Stage2Miss):
                return stop
            self._missed = stop
            if self._memory.translate(stop.gpa, stop.write, stop.private) is None:
                return stop

    async def _next_stop(self) -> Stop:
        if self.came_with_stop:
            self.came_with_stop = False
            return read_stop(self.block)
        leaves = self._mmio
        self._mmio = []
        generation = self.cpus.generation
        missed, self._missed = self._missed, None
        if missed is not None and (leaf := await self._leaf(missed)) is not None:
            leaves = [*leaves, leaf]
            generation = self._leaf_generation
        return await self._enter(generation, leaves)

    async def _leaf(self, missed: Stage2Miss) -> bytes | None:
        """What stage 2 has for an access that the client has missed, as it is now."""
        while True:
            found = self._memory.translate(missed.gpa, missed.write, missed.private)
            if found is None:
                return None
            self._leaf_generation = self.cpus.generation
            hva = await self.cpus.place(found, missed.gpa)
            if self.cpus.generation == self._leaf_generation:  # else it may be another since an alias was made
                break
        gfn, count = gfn_of(missed.gpa), 1
        access, leaf = self.cpus.leaf_of(gfn, missed.private)
        if found.window == USER_MEMORY:
            gfn, count, hva = leaf.gfn, 1 << leaf.order, leaf.hva
        return _LEAF.pack(gfn, count, hva, _KINDS[access], _WRITABLE if found.writable else 0)

    async def _enter(self, generation: int, leaves: list[bytes]) -> Stop:
        assert self.file is not None
        self.set_direct(self._may_be_direct())
        call = self.cpus.client.server.current_call()
        assert call is not None
        payload = _ENTER.pack(self.file.inode_number, generation, len(leaves)) + b"".join(leaves)
        self.inside = True
        try:
            result = await call.channel.upcall(Upcall.ENTER, payload)
        except ClientGone:
            raise Refusal(errno.EINTR, "run.interrupted", vcpu=self.file.vcpu.number) from None
        finally:
            self.inside = False
        if result.error:
            raise Refusal(errno.ENOMEM, "vcpu.leaves", vcpu=self.file.vcpu.number, host_errno=result.error)
        if result.value == STOP_LEFT:
            return Left()
        return read_stop(self.block)

    def _fault(self, fault: HostFault) -> Stop:
        """A page of an alias that was closed: a miss, like another. Other memory is the client's own."""
        if self.cpus.alias_at(fault.hva) is None:
            return fault
        return Stage2Miss(fault.gpa, fault.write, private=fault.private)

    def map_mmio(self, gpa: int, write: bool) -> None:
        """See RemoteEngine."""
        self._mmio.append(_LEAF.pack(gfn_of(gpa), 1, 0, _BOTH_KINDS, _MMIO))

    # Without the server

    def set_direct(self, direct: bool) -> None:
        """Whether the client may run it, and come back with a port or MMIO exit, without asking."""
        self._shared[0:4] = int(direct).to_bytes(4, "little")

    @property
    def direct_exits(self) -> int:
        """How often it has."""
        return int.from_bytes(self._shared[_DIRECT_EXITS_AT : _DIRECT_EXITS_AT + 8], "little")

    def allow_direct(self) -> None:
        """The next KVM_RUN need not ask, unless something of the last is left, or its VM has what must be asked."""
        if self.file is None:
            return
        left = self.came_with_stop or self.file.vcpu.unanswered is not None
        self.set_direct(not left and self._may_be_direct())

    def _may_be_direct(self) -> bool:
        """Nothing in the kernel takes part in an exit, and nobody looks at each."""
        assert self.file is not None
        vcpu = self.file.vcpu
        kvm = vcpu.kvm
        has_devices = kvm.apic_in_kernel or bool(kvm.io_devices)
        return not (has_devices or kvm.tracer.enabled or kvm.dead or vcpu.guest_mode is not None)

    def kick(self) -> None:
        """Have it come back, if it is in the guest."""
        client = self.cpus.client
        if self.inside and self.file is not None:
            client.server.scheduler.begin(self._kick(), "kick")

    async def _kick(self) -> None:
        client, file = self.cpus.client, self.file
        assert file is not None
        try:
            if client.helper is not None:
                await client.helper.upcall(Upcall.KICK, a=file.inode_number)
        except ClientGone:
            pass

    # Engine

    def run(self) -> Stop:
        """Only the client's thread can."""
        raise AssertionError("a vCPU of a client is entered, not run")

    def emulate_mmio(self, gpa: int, write: bool) -> Stop:
        """See `run`."""
        self.map_mmio(gpa, write)
        return SliceOver()

    def flush_tlb(self) -> None:
        """The client is told by ClientCpus."""

    def close(self) -> None:
        """The client's side goes with its VM."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            self.close_block()
            self._shared.close()
