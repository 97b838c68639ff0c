"""Host: one machine in a script. Builds every room and offers what programs do with them, blocking.

    with Host() as host:
        vm = host.create_vm(VmType.SW_PROTECTED)
        gmem = vm.create_guest_memfd(1 << 20, mmap=True, init_shared=True)
        vm.set_memory_region(slot=0, gpa=0, size=1 << 20, gmem=gmem)
        view = gmem.mmap()
        view[0:5] = b"hello"
        gmem.convert(0, 4096, Access.PRIVATE)
        view[0]                                    # raises SigBus

The rooms themselves are coroutines; everything here runs one to its end under the fifo policy, so a script or a REPL
never sees `await`. What a call refuses it raises as `Refusal`, which names the rule.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

from guestmem.arch import Lifetime, Platform
from guestmem.arch.platforms import Platforms
from guestmem.cpu.default import EngineFactory, default_engine
from guestmem.iommu import DmaDevice, Iommu
from guestmem.iommu.script import IommuHandle
from guestmem.kvm.addresses import gfn_of
from guestmem.kvm.context import KvmGmemContext
from guestmem.kvm.enc_context import copy_enc_context_from, move_enc_context_from
from guestmem.kvm.exits import Exit, HltExit, ShutdownExit
from guestmem.kvm.gmem import create_guest_memfd, set_memory_attributes2
from guestmem.kvm.identity import IdentityPool
from guestmem.kvm.irqchip import IrqChip
from guestmem.kvm.link import link_guest_memfd
from guestmem.kvm.populate import populate
from guestmem.kvm.prefault import pre_fault_memory
from guestmem.kvm.protected.launch_script import LaunchHandle
from guestmem.kvm.protection import dma_rules
from guestmem.kvm.set_region import set_user_memory_region2
from guestmem.kvm.vcpu import Vcpu, create_vcpu
from guestmem.kvm.vm import Kvm, KvmEnvironment
from guestmem.kvm.vm_attributes import set_memory_attributes
from guestmem.kvm.vm_irqchip import any_irqchip, create_irqchip, create_pit, split_irqchip
from guestmem.memory import (
    PAGE_SHIFT,
    PAGE_SIZE,
    Abilities,
    Access,
    Backing,
    File,
    HugePolicy,
    Hugetlb,
    Inode,
    InodeStatistics,
    MemfdBacking,
    Owner,
    Pool,
)
from guestmem.memory.huge_backing import new_huge_backing
from guestmem.memory.pages import ORDERS, page_range
from guestmem.sched import Deadlock, Policy, Scheduler, Task
from guestmem.trace import Tracer
from guestmem.uapi import kvm as uapi
from guestmem.uapi.kvm import VmType
from guestmem.uapi.levels import FUTURE, AbiLevel
from guestmem.uapi.structs import CreateGuestMemfd, LinkGuestMemfd, MemoryAttributes, MemoryAttributes2, PreFaultMemory
from guestmem.uapi.structs import UserspaceMemoryRegion2 as Region2
from guestmem.userspace import Pin, Process, Userspace, View

T = TypeVar("T")


class Host:
    """A machine with memory, a kernel and one process, the VMM.

    `memory` is what its pool holds, in bytes; the default is this machine's. `level` is the ABI of its KVM.
    With `debug`, freed pages are filled with junk. `policy` may be an exploring one. `identities` is how many ASIDs or
    HKIDs its hardware has. `hugepages` has how many huge pages of an order are set aside, or how many on each node:
    {ORDER_2M: 512, ORDER_1G: [2, 2]}; what their files do where the postings differ is `huge_policy`.
    Ownership of pages lasts for `lifetime`; with `scramble` conversions change the bytes of software-protected VMs.
    With `clients` mappable files are mapped by other processes, so their memory is never hugetlb's.

    Raises: Refusal ENOMEM `pool.empty`, if the huge pages are more than the memory.
    """

    orders: tuple[int, ...] = ORDERS
    """Orders that folios can have, largest first, 0 last."""

    def __init__(
        self,
        *,
        memory: int | None = None,
        level: AbiLevel = FUTURE,
        engine: EngineFactory = default_engine,
        policy: Policy | None = None,
        debug: bool = False,
        identities: int = 509,
        hugepages: Mapping[int, int | Sequence[int]] | None = None,
        huge_policy: HugePolicy = HugePolicy(),  # noqa: B008 (immutable)
        clients: bool = False,
        lifetime: Lifetime = Lifetime.BINDING,
        scramble: bool = False,
    ) -> None:
        self.scheduler = Scheduler(policy)
        self.tracer = Tracer()
        self.level = level
        pages = (memory or os.sysconf("SC_PHYS_PAGES") * PAGE_SIZE) // PAGE_SIZE
        self.pool = self._new_pool(pages)
        self.hugetlb = Hugetlb(self.pool, hugepages or {})
        self.huge_policy = huge_policy
        self.identities = IdentityPool(identities)
        self.userspace = Userspace(self.scheduler, self.tracer, self.pool, self._new_backing)
        self.process = self.userspace.spawn()
        self.inodes: list[Inode] = []
        self.vms: list[Kvm] = []
        self.iommu = Iommu(self.scheduler, self.tracer, self.orders, dma_rules)
        self._debug = debug
        self._clients = clients
        self.platforms: Mapping[VmType, Platform] = Platforms(
            self.pool.capacity + 1, self.orders, self._new_fails(), scramble
        )
        kernel = self.scheduler, self.tracer, self.identities, self.new_inode, engine, self.orders[:-1]
        self.environment = KvmEnvironment(*kernel, self.platforms, lifetime)

    def __enter__(self) -> Host:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """The VMM exits: every mapping and descriptor goes, and with them all that nobody else holds."""
        self.scheduler.close()
        self.run(self.process.exit(), "exit")

    def run(self, coroutine: Coroutine[Any, None, T], name: str = "script") -> T:
        """Run a coroutine of any room to its end; others run while it waits. `name` is the task's in traces."""
        return self.scheduler.run(coroutine, name)

    def create_vm(self, vm_type: VmType = VmType.DEFAULT, level: AbiLevel | None = None) -> Vm:
        """KVM_CREATE_VM."""
        kvm = Kvm(self.environment, len(self.vms), vm_type, level or self.level, self.process.mm)
        self.vms.append(kvm)
        fd = self.process.fds.reserve()
        self.process.fds.install(fd, kvm)
        return Vm(self, kvm, fd)

    def open_iommu(self) -> IommuHandle:
        """open("/dev/iommu")."""
        return IommuHandle(self.run, self.iommu.open(), self.process.mm, self.process.fds)

    def new_dma_device(self, *, page_requests: bool = True) -> DmaDevice:
        """Plug a device in. `page_requests`: it can ask for pages that it finds not mapped."""
        return self.iommu.new_device(page_requests)

    def new_inode(
        self, *, size: int, abilities: Abilities, owner: Owner | None = None, order: int = 0, memfd: int | None = None
    ) -> Inode:
        """An inode without a KVM (R13). Bytes; `order` is that of its huge pages, `memfd` 4K memory that is taken over.

        Raises: Refusal ENOMEM `create.reservation`, `create.cgroup`.
        """
        number = len(self.inodes) + 1
        source = self.hugetlb.subpool(order, size // PAGE_SIZE >> order) if order else self.pool
        mappable = abilities.mmap and self._clients
        try:
            pages, name = size // PAGE_SIZE, f"guest_memfd:{number}"
            given = MemfdBacking(pages, name, fd=memfd) if memfd is not None else None
            backing = given or self._new_backing(pages, name, order, mappable)
        except OSError:
            source.close()
            raise
        inode = Inode(
            self.scheduler,
            self.tracer,
            source,
            backing,
            number=number,
            size=size,
            abilities=abilities,
            owner=owner,
            orders=tuple(smaller for smaller in self.orders if smaller <= order),
            policy=self.huge_policy,
        )
        self.inodes.append(inode)
        return inode

    def anonymous(self, size: int) -> View:
        """Anonymous memory of the VMM, as plain memslots and populate sources are made of. Bytes."""
        hva = self.run(self.process.mmap_anonymous(size), "mmap")
        return View(self.run, self.process.mm, hva, size)

    def run_vcpus(self, *vcpus: VcpuHandle) -> Iterator[tuple[VcpuHandle, Exit]]:
        """Run vCPUs side by side and hand out their exits, one at a time, as they come.

        The script answers an exit (fills in its `data` or `ret`, converts memory, ...) in the body of its loop; the
        vCPU goes on when the loop does. Those that halt or shut down are not entered again. Leaving the loop early
        leaves the others where they are.
        """
        running: dict[Task[Exit], VcpuHandle] = {self._enter(vcpu): vcpu for vcpu in vcpus}
        try:
            while running:
                task = self._first_done(running)
                vcpu = running.pop(task)
                exit_ = task.outcome()
                yield vcpu, exit_
                if not isinstance(exit_, (HltExit, ShutdownExit)):
                    running[self._enter(vcpu)] = vcpu
        finally:
            for task, vcpu in running.items():
                vcpu.vcpu.immediate_exit = task.signal_pending = True  # the latter wakes those that sleep in HLT
            while not all(task.done for task in running):
                self.scheduler.step()
            for vcpu in running.values():
                vcpu.vcpu.immediate_exit = False

    def check(self) -> None:
        """Every room's own invariants, at a quiet moment."""
        self.pool.check()
        self.hugetlb.check()
        for inode in self.inodes:
            inode.check()
        for kvm in self.vms:
            kvm.check()
        self.process.mm.check()
        self.iommu.check()

    def _new_fails(self) -> Callable[[str], bool]:
        """What platforms ask before each call of hardware or firmware."""
        return self.scheduler.fails

    def _new_pool(self, pages: int) -> Pool:
        return Pool(pages)

    def _new_backing(self, pages: int, name: str, order: int = 0, mappable: bool = False) -> Backing:
        if order:
            return new_huge_backing(pages, name, order, mappable=mappable, junk=self._debug)
        return MemfdBacking(pages, name, junk=self._debug)

    def _enter(self, vcpu: VcpuHandle) -> Task[Exit]:
        return self.scheduler.spawn(vcpu.vcpu.run(), f"vcpu {vcpu.vcpu.number}")

    def _first_done(self, tasks: Iterable[Task[Exit]]) -> Task[Exit]:
        while True:
            for task in tasks:
                if task.done:
                    return task
            if not self.scheduler.step() and not self.scheduler.timers.sleep():
                raise Deadlock(list(tasks))


class Vm:
    """A VM file descriptor."""

    def __init__(self, host: Host, kvm: Kvm, fd: int) -> None:
        self.host = host
        self.kvm = kvm
        self.fd = fd
        self.launch = LaunchHandle(host.run, kvm)

    def create_guest_memfd(self, size: int, *, mmap: bool = False, init_shared: bool = False, order: int = 0) -> Gmem:
        """KVM_CREATE_GUEST_MEMFD. Bytes; with `order`, of huge pages. Raises: Refusal `create.*`, `fd.limit`."""
        bit = self.kvm.level.create_flag
        flags = mmap * bit("MMAP") | init_shared * bit("INIT_SHARED")
        if order:
            flags |= bit("HUGETLB") | (order + PAGE_SHIFT) << uapi.GUEST_MEMFD_HUGETLB_SHIFT
        process = self.host.process
        fd = self.host.run(create_guest_memfd(self.kvm, process.fds, CreateGuestMemfd(size, flags)), "create")
        return self._gmem(fd)

    def link_guest_memfd(self, gmem: Gmem) -> Gmem:
        """KVM_LINK_GUEST_MEMFD: this VM's own view of the memory of another VM's file. Raises: Refusal `link.*`."""
        fds = self.host.process.fds
        return self._gmem(self.host.run(link_guest_memfd(self.kvm, fds, LinkGuestMemfd(gmem.fd)), "link"))

    def move_enc_context_from(self, source: Vm) -> None:
        """KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM: `source` is dead afterwards. Raises: Refusal `enc_context.*`, `move.*`."""
        self.host.run(move_enc_context_from(self.kvm, self.host.process.fds, source.fd), "move")

    def copy_enc_context_from(self, source: Vm) -> None:
        """KVM_CAP_VM_COPY_ENC_CONTEXT_FROM: be a helper of `source`. Raises: Refusal `enc_context.*`, `copy.*`."""
        self.host.run(copy_enc_context_from(self.kvm, self.host.process.fds, source.fd), "copy")

    def set_memory_region(
        self,
        slot: int,
        gpa: int,
        size: int,
        *,
        gmem: Gmem | None = None,
        offset: int = 0,
        memory: View | None = None,
        flags: int = 0,
        userfault_bitmap: View | None = None,
    ) -> None:
        """KVM_SET_USER_MEMORY_REGION2; `size` 0 deletes the slot. Bytes. `userfault_bitmap`, with KVM_MEM_USERFAULT: a
        bit for each frame that the guest may not touch yet. Raises: Refusal `region.*`, `bind.*`."""
        if gmem is not None:
            flags |= uapi.KVM_MEM_GUEST_MEMFD
        fd = gmem.fd if gmem is not None else -1
        region = Region2(slot, flags, gpa, size, memory.hva if memory else 0, offset, fd)
        if userfault_bitmap is not None:
            flag = self.kvm.level.region_flags.get("USERFAULT", uapi.KVM_MEM_USERFAULT)
            region = region.with_userfault(flag, userfault_bitmap.hva)
        self.host.run(set_user_memory_region2(self.kvm, self.host.process.fds, region), "set region")

    def set_attributes(self, gpa: int, size: int, access: Access) -> None:
        """KVM_SET_MEMORY_ATTRIBUTES, of levels without in-place conversion. Raises: Refusal `attributes.*`."""
        self.host.run(set_memory_attributes(self.kvm, MemoryAttributes(gpa, size, _bits(access))), "set attributes")

    def pre_fault(self, gpa: int, size: int) -> int:
        """KVM_PRE_FAULT_MEMORY; how many bytes are left undone. Raises: Refusal `prefault.*`, `fault.*`."""
        return self.host.run(pre_fault_memory(self.kvm, PreFaultMemory(gpa, size)), "pre-fault").size

    def populate(self, gpa: int, source: View | None, pages: int) -> int:
        """Put first bytes into private memory; how many pages were done. Raises: Refusal `populate.*`, `fault.*`."""
        hva = source.hva if source is not None else None
        return self.host.run(populate(self.kvm, gfn_of(gpa), hva, pages), "populate")

    def enable_hypercalls(self, *numbers: int) -> None:
        """KVM_CAP_EXIT_HYPERCALL: these come back as exits instead of -KVM_ENOSYS."""
        for number in numbers:
            self.kvm.enabled_hypercalls |= 1 << number

    def create_irqchip(self, *, split_pins: int | None = None, pit: bool = False) -> IrqChip:
        """KVM_CREATE_IRQCHIP, and KVM_CREATE_PIT2 with `pit`; KVM_CAP_SPLIT_IRQCHIP with `split_pins`. Before vCPUs.
        Raises: Refusal `irqchip.*`, `pit.*`."""
        if split_pins is None:
            create_irqchip(self.kvm)
        else:
            split_irqchip(self.kvm, split_pins)
        if pit:
            create_pit(self.kvm, has_speaker=True)
        return any_irqchip(self.kvm)

    def create_vcpu(self, number: int = 0) -> VcpuHandle:
        """KVM_CREATE_VCPU."""
        vcpu = self.host.run(create_vcpu(self.kvm, number), "create vcpu")
        fd = self.host.process.fds.reserve()
        self.host.process.fds.install(fd, vcpu)
        return VcpuHandle(self.host, vcpu, fd)

    def close(self) -> None:
        """Close the descriptor. Files, vCPUs and helpers keep the VM."""
        self.host.run(self.host.process.fds.close(self.fd), "close")

    def _gmem(self, fd: int) -> Gmem:
        file = self.host.process.fds.get(fd)
        assert isinstance(file, File)
        return Gmem(self.host, file, fd)


class VcpuHandle:
    """A vCPU file descriptor."""

    def __init__(self, host: Host, vcpu: Vcpu, fd: int) -> None:
        self.host = host
        self.vcpu = vcpu
        self.engine = vcpu.engine
        self.fd = fd

    def run(self) -> Exit:
        """KVM_RUN. Several at once: Host.run_vcpus."""
        return self.host.run(self.vcpu.run(), f"vcpu {self.vcpu.number}")

    def close(self) -> None:
        self.host.run(self.host.process.fds.close(self.fd), "close")


class Gmem:
    """A guest_memfd descriptor."""

    def __init__(self, host: Host, file: File, fd: int) -> None:
        self.host = host
        self.file = file
        self.fd = fd

    @property
    def inode(self) -> Inode:
        return self.file.inode

    def convert(self, offset: int, size: int, to: Access) -> None:
        """KVM_SET_MEMORY_ATTRIBUTES2. Bytes. Raises: Refusal `attributes2.*`, `convert.*`."""
        self.host.run(set_memory_attributes2(self.file, MemoryAttributes2(offset, size, _bits(to))), "convert")

    def allocate(self, offset: int, size: int) -> None:
        """fallocate(KEEP_SIZE). Bytes. Raises: Refusal `fallocate.*`, `pool.*`, `split.vmemmap`."""
        self.host.run(self.inode.fallocate(1, offset, size), "fallocate")

    def punch_hole(self, offset: int, size: int) -> None:
        """fallocate(PUNCH_HOLE | KEEP_SIZE). Bytes. Raises: Refusal `fallocate.*`, `punch.busy`."""
        self.host.run(self.inode.fallocate(3, offset, size), "punch hole")

    def mmap(self, offset: int = 0, size: int | None = None, process: Process | None = None) -> View:
        """A mapping in the VMM (or a process that was forked from it), as a guarded view. Raises: Refusal `mmap.*`."""
        process = process or self.host.process
        size = self.inode.size - offset if size is None else size
        hva = self.host.run(process.mmap(self.fd, size, offset), "mmap")
        return View(self.host.run, process.mm, hva, size)

    def pin(self, view: View, offset: int, pages: int) -> Pin:
        """A long-term pin of pages of a view of this file; unpin() ends it. Raises: Refusal `user.page`."""
        return self.host.run(self.host.process.pin(view.hva + offset, pages), "pin")

    def accesses(self) -> list[tuple[int, int, Access]]:
        """(offset, size, access) of each stretch, in bytes, over the whole file."""
        pages = page_range(0, self.inode.size)
        assert pages is not None
        return [(run.start * PAGE_SIZE, run.pages * PAGE_SIZE, access) for run, access in self.inode.runs(pages)]

    def statistics(self) -> InodeStatistics:
        return self.inode.statistics()

    def bound_to(self, vm: Vm) -> bool:
        """Whether this file is a view of `vm`."""
        return isinstance(self.file.private_data, KvmGmemContext) and self.file.private_data.kvm is vm.kvm

    def close(self) -> None:
        self.host.run(self.host.process.fds.close(self.fd), "close")


def _bits(access: Access) -> int:
    return uapi.KVM_MEMORY_ATTRIBUTE_PRIVATE if access is Access.PRIVATE else 0
