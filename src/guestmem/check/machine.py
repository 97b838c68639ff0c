"""Machine: a Host that a scenario sets up, and the actors that then race in it.

A scenario calls the blocking methods of Host while it sets up; what an actor will do is a coroutine, from a method here
or written on the spot. `actor` names them; nothing of them runs before the explorer does.

Each call of an actor has an *answer*: "ok", the rule of its refusal, a signal, what a guest read. Answers are part of
the state, and what a scenario's `sometimes` speaks of.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any, ClassVar

from guestmem.arch import Lifetime
from guestmem.check.arena import Arena
from guestmem.check.canonical import FINGERPRINT
from guestmem.check.ghost import Ghost, GhostPool
from guestmem.check.invariants import PROPERTIES, Violation, check_all, snapshot
from guestmem.cpu.engine import Engine, GuestMemory
from guestmem.cpu.scripted import ScriptedEngine, Step
from guestmem.host import Gmem, Host, Vm
from guestmem.kvm.addresses import Gfn
from guestmem.kvm.dirty_log import get_dirty_log
from guestmem.kvm.exits import Exit, HltExit, MemoryFaultExit
from guestmem.kvm.gmem import set_memory_attributes2
from guestmem.kvm.populate import PostPopulate, copy_source, populate
from guestmem.kvm.prefault import pre_fault_memory
from guestmem.kvm.set_region import set_user_memory_region2
from guestmem.kvm.vcpu import Vcpu
from guestmem.kvm.vm_attributes import set_memory_attributes
from guestmem.memory import (
    PAGE_SHIFT,
    PAGE_SIZE,
    Access,
    Backing,
    PageIndex,
    Pool,
)
from guestmem.sched import Policy, Task
from guestmem.trace import Refusal
from guestmem.uapi.kvm import KVM_MEM_GUEST_MEMFD, KVM_MEMORY_ATTRIBUTE_PRIVATE, VmType
from guestmem.uapi.levels import FUTURE, AbiLevel
from guestmem.uapi.structs import MemoryAttributes, MemoryAttributes2, PreFaultMemory, UserspaceMemoryRegion2
from guestmem.userspace import Process, SigBus, SigSegv, View

POOL_PAGES = 64
Call = Coroutine[Any, Any, object]
GuestScript = tuple[Step, ...]
ScriptEngine = Callable[[GuestMemory, Sequence[Step]], Engine]

_arenas: list[Arena] = []


class Machine(Host):
    """What a scenario builds. `failures` is how many fallible steps may fail in one execution. With `effects_only` no
    property is asked in between: what breaks must show by itself, as it does on a machine that nobody looks into.

    Its huge pages are of 4 pages, which split into 2 and then into 1: every page can be looked at in every state.
    """

    orders = (2, 1, 0)

    script_engine: ClassVar[ScriptEngine] = ScriptedEngine
    """What executes the scripts of guests."""

    protected = VmType.SNP
    """The type of protected VMs in scenarios that are about any of them."""

    def __init__(self, *, level: AbiLevel = FUTURE, failures: int = 0, lifetime: Lifetime = Lifetime.BINDING) -> None:
        self._arena = _arenas.pop() if _arenas else Arena()
        self._script: list[Step] = []
        self.failed_calls: tuple[str, ...] = ()  # of hardware and firmware
        super().__init__(
            memory=POOL_PAGES * PAGE_SIZE, level=level, engine=self._new_engine, debug=True, lifetime=lifetime
        )
        assert isinstance(self.pool, GhostPool)
        self.ghost = Ghost(self, self.pool)
        self.failures_left = failures
        self.effects_only = False
        self.logged = 0  # frames that a dirty log has named, a bit each
        self.before_start: list[Callable[[], object]] = []  # the last of setting up, once all else is there
        self._unstarted: list[Call] = []
        self.actors: list[tuple[str, tuple[Call, ...]]] = []
        self.answers: dict[str, tuple[str, ...]] = {}
        self.tasks: list[Task[None]] = []

    def __fingerprint__(self) -> None:
        """What an actor's frame refers to; its state is walked from the roots."""

    def _new_pool(self, pages: int) -> Pool:
        return GhostPool(pages)

    def _new_fails(self) -> Callable[[str], bool]:
        return self.firmware_fails

    def firmware_fails(self, call: str) -> bool:
        """A call of hardware or firmware is made; whether it fails."""
        failed = self.scheduler.fails(call)
        if failed:
            self.failed_calls += (call,)
        return failed

    def _new_backing(self, pages: int, name: str, order: int = 0, mappable: bool = False) -> Backing:
        return self._arena.take(pages)

    def _new_engine(self, memory: GuestMemory) -> Engine:
        return type(self).script_engine(memory, self._script)

    # Setting up

    def vm(self, vm_type: VmType = VmType.SW_PROTECTED) -> Vm:
        """The machine's first VM; made when first asked for."""
        return Vm(self, self.vms[0], 0) if self.vms else self.create_vm(vm_type)

    def create_vm(self, vm_type: VmType = VmType.DEFAULT, level: AbiLevel | None = None) -> Vm:
        """KVM_CREATE_VM."""
        vm = super().create_vm(vm_type, level)
        self.ghost.identity[vm.kvm.number] = vm.kvm.machine.identity
        return vm

    def gmem(
        self, pages: int = 1, *, init_shared: bool = True, mmap: bool = True, gpa: int | None = 0, order: int = 0
    ) -> Gmem:
        """A file of the first VM, bound as slot 0 at `gpa` unless that is None; with `order`, of huge pages, of which
        there are just as many as it needs."""
        vm = self.vm()
        if order:
            self.hugetlb.add(order, pages >> order)
        gmem = vm.create_guest_memfd(pages * PAGE_SIZE, mmap=mmap, init_shared=init_shared, order=order)
        if gpa is not None:
            vm.set_memory_region(0, gpa, pages * PAGE_SIZE, gmem=gmem)
        return gmem

    def actor(self, name: str, *calls: Call) -> None:
        """A task that makes `calls`, one after another, whatever their answers."""
        self.actors.append((name, calls))
        self.answers[name] = ()

    def beforehand(self, call: Call) -> None:
        """Make `call` when all else is set up and a launch is finished, right before the actors begin."""
        self._unstarted.append(call)
        self.before_start.append(lambda: self.run(call))

    # What actors do

    def guest(self, *script: Step, vm: Vm | None = None) -> Call:
        """A new vCPU's KVM_RUN, with a guest that does the accesses of `script`. Answers what it read, or its exit."""
        vm = vm or self.vm()
        self._script = list(script)
        return self.run_vcpu(vm.create_vcpu(len(vm.kvm.vcpus)).vcpu)

    def run_vcpu(self, vcpu: Vcpu) -> Call:
        """KVM_RUN of a vCPU that is there."""

        async def run() -> str:
            exit_ = await vcpu.run()
            loaded = getattr(vcpu.engine, "loaded", [])
            return _exit(exit_) + "".join(f" {byte:#04x}" for byte in loaded)

        return run()

    def convert(self, gmem: Gmem, to: Access, page: int = 0, pages: int = 1) -> Call:
        """KVM_SET_MEMORY_ATTRIBUTES2 on the file."""
        bits = KVM_MEMORY_ATTRIBUTE_PRIVATE if to is Access.PRIVATE else 0
        attributes = MemoryAttributes2(page * PAGE_SIZE, pages * PAGE_SIZE, bits)
        return self.atomic(set_memory_attributes2(gmem.file, attributes))

    def set_attributes_of(self, vm: Vm, to: Access, page: int = 0, pages: int = 1) -> Call:
        """KVM_SET_MEMORY_ATTRIBUTES on the VM, of levels without in-place conversion."""
        bits = KVM_MEMORY_ATTRIBUTE_PRIVATE if to is Access.PRIVATE else 0
        attributes = MemoryAttributes(page * PAGE_SIZE, pages * PAGE_SIZE, bits)
        return self.atomic(set_memory_attributes(vm.kvm, attributes))

    def write(self, view: View, data: bytes, page: int = 0, process: Process | None = None) -> Call:
        """The host stores `data` at the start of a page of its mapping."""
        return (process or self.process).mm.write(view.hva + page * PAGE_SIZE, data)

    def read(self, view: View, page: int = 0, size: int = 1, process: Process | None = None) -> Call:
        """The host loads the first bytes of a page. Answers what it read."""

        async def read() -> str:
            data = await (process or self.process).mm.read(view.hva + page * PAGE_SIZE, size)
            return f"read 0x{data.hex()}"

        return read()

    def pin(self, view: View, page: int = 0) -> Call:
        """A long-term pin; it stays to the end of the execution."""
        return self.process.pin(view.hva + page * PAGE_SIZE, 1)

    def pin_briefly(self, view: View, page: int = 0) -> Call:
        """A pin that goes as soon as others have had a chance to run, as a direct I/O's."""

        async def transfer() -> None:
            pin = await self.process.pin(view.hva + page * PAGE_SIZE, 1)
            await self.scheduler.preempt("I/O in flight")
            pin.unpin()

        return transfer()

    def punch(self, gmem: Gmem, page: int = 0, pages: int = 1) -> Call:
        """fallocate(PUNCH_HOLE | KEEP_SIZE)."""
        return gmem.inode.fallocate(3, page * PAGE_SIZE, pages * PAGE_SIZE)

    def allocate(self, gmem: Gmem, page: int = 0, pages: int = 1) -> Call:
        """fallocate(KEEP_SIZE)."""
        return gmem.inode.fallocate(1, page * PAGE_SIZE, pages * PAGE_SIZE)

    def poison(self, gmem: Gmem, page: int = 0) -> Call:
        """The memory of a page goes bad."""

        async def fail() -> str:
            return "ok" if await gmem.inode.memory_failure(PageIndex(page)) else "no page"

        return fail()

    def bind(
        self,
        gmem: Gmem,
        slot: int,
        gpa: int,
        page: int = 0,
        pages: int = 1,
        vm: Vm | None = None,
        missing: View | None = None,
    ) -> Call:
        """KVM_SET_USER_MEMORY_REGION2 with a guest_memfd; `missing` is a bitmap for KVM Userfault."""
        size, offset = pages * PAGE_SIZE, page * PAGE_SIZE
        region = UserspaceMemoryRegion2(
            slot, KVM_MEM_GUEST_MEMFD, gpa, size, guest_memfd_offset=offset, guest_memfd=gmem.fd
        )
        if missing is not None:
            region = region.with_userfault((vm or self.vm()).kvm.level.region_flags["USERFAULT"], missing.hva)
        return self.set_region(region, vm)

    def plain_slot(self, view: View, slot: int, gpa: int, pages: int = 1, flags: int = 0, vm: Vm | None = None) -> Call:
        """KVM_SET_USER_MEMORY_REGION2 with host memory."""
        return self.set_region(UserspaceMemoryRegion2(slot, flags, gpa, pages * PAGE_SIZE, view.hva), vm)

    def delete_slot(self, slot: int = 0, vm: Vm | None = None) -> Call:
        """KVM_SET_USER_MEMORY_REGION2 of size 0."""
        return self.set_region(UserspaceMemoryRegion2(slot, 0, 0, 0), vm)

    def set_region(self, region: UserspaceMemoryRegion2, vm: Vm | None = None) -> Call:
        """KVM_SET_USER_MEMORY_REGION2, any."""
        return self.atomic(set_user_memory_region2((vm or self.vm()).kvm, self.process.fds, region))

    def dirty_log(self, slot: int = 0) -> Call:
        """KVM_GET_DIRTY_LOG. Answers what it and all before it have named, as a VMM collects it that migrates."""

        async def log() -> str:
            bitmap = await get_dirty_log(self.vm().kvm, slot)
            self.logged |= int.from_bytes(bitmap, "little")  # not in one line, which would read it before the wait
            return f"dirty {self.logged:#x}"

        return log()

    def pre_fault(self, gpa: int = 0, pages: int = 1, vm: Vm | None = None) -> Call:
        """KVM_PRE_FAULT_MEMORY. Answers how many pages are left."""

        async def fault() -> str:
            left = await pre_fault_memory((vm or self.vm()).kvm, PreFaultMemory(gpa, pages * PAGE_SIZE))
            return f"left {left.size >> PAGE_SHIFT}" if left.size else "ok"

        return fault()

    def populate_from(
        self, source: int | None, gpa: int = 0, pages: int = 1, launch: PostPopulate = copy_source
    ) -> Call:
        """Populate private pages from a host address, None for in place. Answers how many pages were done."""

        async def fill() -> str:
            done = await populate(self.vm().kvm, Gfn(gpa >> PAGE_SHIFT), source, pages, launch)
            return "ok" if done == pages else f"done {done}"

        return fill()

    def close_fd(self, fd: int, process: Process | None = None) -> Call:
        return (process or self.process).fds.close(fd)

    def unmap(self, view: View) -> Call:
        return self.process.mm.unmap(view.hva, len(view))

    def discard(self, view: View) -> Call:
        """madvise(MADV_DONTNEED) of a whole mapping."""
        return self.process.mm.discard(view.hva, len(view))

    def remove(self, view: View) -> Call:
        """madvise(MADV_REMOVE) of a whole mapping."""
        return self.process.mm.remove(view.hva, len(view))

    def reclaim(self, view: View, page: int = 0) -> Call:
        """Memory is short: a page of a mapping is saved and freed, if it can be. Answers whether."""

        async def reclaim() -> str:
            return "freed" if await self.process.mm.reclaim(view.hva + page * PAGE_SIZE) else "kept"

        return reclaim()

    # For the explorer

    def start(self, policy: Policy) -> list[Task[None]]:
        """From now on `policy` decides; the actors are parked before their first line."""
        for finish in self.before_start:
            finish()
        self.scheduler.policy = policy
        self.scheduler.explores = True
        self.tasks = [self.scheduler.spawn(self._act(name, calls), name) for name, calls in self.actors]
        return self.tasks

    def digest(self) -> bytes:
        """The state, in 16 bytes: equal for states that the rest of an execution cannot tell apart."""
        return FINGERPRINT(
            self.inodes,
            self.vms,
            self.userspace,
            self.iommu,
            self.identities,
            self.tasks,
            self.answers,
            self.failures_left,
            self.failed_calls,
            self.logged,
            self.ghost,
            self.hugetlb,
            self.pool,
        )

    def check_state(self) -> None:
        """Every property of one state, unless only effects count. Raises: Violation."""
        if self.effects_only:
            return
        check_all(self)
        for name, facts in self.ghost.broken():
            raise Violation(name, facts)

    def check_end(self) -> None:
        """All actors are done: the rooms' own invariants, then the VMM exits and nothing may be left (L3)."""
        self.scheduler.explores = False
        for pin in list(self.userspace.pins):
            pin.unpin()
        self.check()
        for process in list(self.userspace.processes):
            self.run(process.exit(), "exit")
        statistics = self.pool.statistics()
        for left, what in (
            (statistics.allocated - statistics.retired, "pages"),
            (sum(pool.used + pool.reserved for pool in self.hugetlb.pools.values()), "huge pages"),
            (len(self.identities.live), "identities"),
            (sum(not kvm.destroyed for kvm in self.vms), "struct kvm"),
            (sum(not inode.destroyed for inode in self.inodes), "inodes"),
            (sum(platform.live_guests() for platform in self.platforms.values()), "guest contexts in firmware"),
            (len(self.iommu.ioases), "IO address spaces"),
            (sum(device.attachment is not None for device in self.iommu.devices), "attached devices"),
        ):
            if left:
                raise Violation("L3", f"{left} {what} left after the last close")
        for name in ("S8", "S10"):  # identities are recycled, and the last pages freed, only now
            for facts in PROPERTIES[name].broken(self):
                raise Violation(name, facts)

    def forget(self) -> None:
        """The execution is over, wherever it stands: close what is suspended and give the memory back."""
        self.scheduler.explores = False
        for task in self.tasks:
            self.scheduler.current = task
            _close(task.coroutine)
        for _, calls in self.actors:
            for call in calls:
                call.close()
        for call in self._unstarted:
            call.close()
        self._arena.reset()
        _arenas.append(self._arena)

    async def _act(self, name: str, calls: tuple[Call, ...]) -> None:
        for call in calls:
            self.answers[name] += (await _answer(call),)

    def atomic(self, call: Call) -> Call:
        """S15: a refused call that nobody else ran beside has changed nothing."""
        if not self.failures_left:
            return call
        self._unstarted.append(call)
        return self._guarded(call)

    async def _guarded(self, call: Call) -> object:
        before, others, mine = snapshot(self), self.others(), self.scheduler.current
        try:
            return await call
        except Refusal as refusal:
            if self.others() == others and snapshot(self) != before:
                assert mine is not None
                raise Violation("S15", f"{mine.name}: {refusal} left something behind") from refusal
            raise

    def others(self) -> int:
        """How often other tasks than the running one have run."""
        me = self.scheduler.current
        return sum(task.turns for task in self.tasks if task is not me)


async def _answer(call: Call) -> str:
    try:
        result = await call
    except Refusal as refusal:
        return refusal.rule
    except SigBus:
        return "SIGBUS"
    except SigSegv:
        return "SIGSEGV"
    return result if isinstance(result, str) else "ok"


def _exit(exit_: Exit) -> str:
    if isinstance(exit_, HltExit):
        return "ok"
    if isinstance(exit_, MemoryFaultExit):
        return exit_.refusal.rule
    return type(exit_).__name__.removesuffix("Exit").lower()


def _close(coroutine: Call) -> None:
    """Close a coroutine that may await while it unwinds, which close() takes for a refusal to go."""
    for _ in range(1000):
        try:
            coroutine.close()
        except RuntimeError:
            continue
        except Exception:
            return
        return
