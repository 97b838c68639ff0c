"""Kvm: one struct kvm. Its locks, memslots, stage 2, attributes and vCPUs; what holds it, and its end.

It is held by its file descriptor, its vCPUs, its guest_memfd files and its helpers, and holds none of them: references
go from file to kvm, never back (L3). The virtual machine (identity) is another object, see `identity`; it may move to
another struct kvm (`enc_context`), which leaves this one dead.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from guestmem.arch import Lifetime, Platform
from guestmem.cpu.engine import Engine, GuestMemory
from guestmem.kvm.addresses import Gfn
from guestmem.kvm.identity import IdentityPool, VirtualMachine
from guestmem.kvm.memslots import MemorySlot, SlotTable
from guestmem.kvm.stage2 import Stage2
from guestmem.memory import PAGE_SHIFT, Access, Inode, Pfn, Range
from guestmem.memory.attributes import Attributes
from guestmem.sched import Lock, LockClass, RefCount, Scheduler, Srcu, Task, WaitQueue
from guestmem.trace import Refusal, Tracer
from guestmem.uapi.kvm import KVM_MEMORY_ATTRIBUTE_PRIVATE, MAX_PHYSICAL_ADDRESS_BITS, VmType
from guestmem.uapi.levels import AbiLevel

if TYPE_CHECKING:
    from guestmem.kvm.vcpu import Vcpu


class HostPage(Protocol):
    """What a host address space gives for one of its pages."""

    @property
    def pfn(self) -> Pfn: ...

    @property
    def hva(self) -> int: ...

    @property
    def window(self) -> tuple[int, int]: ...

    @property
    def writable(self) -> bool: ...

    @property
    def order(self) -> int:
        """The 2**order pages around it, aligned by frame, lie side by side at host addresses."""
        ...


class PinnedPage(Protocol):
    """A page of a host address space that stays where it is until it is put. Who writes to it says so with
    `set_dirty`: no page table saw the write."""

    async def read(self, offset: int, size: int) -> bytes:
        """Bytes of it. Raises: Refusal EFAULT `user.page`, where it cannot be touched any more."""
        ...

    async def write(self, offset: int, data: bytes) -> None:
        """Raises: as `read`."""
        ...

    def set_dirty(self) -> None: ...

    def put(self) -> None: ...


class HostAddressSpace(Protocol):
    """What KVM needs of the memory of the process that made the VM. It is watched through `notifiers`."""

    @property
    def notifiers(self) -> list[Any]: ...

    async def user_page(self, hva: int, write: bool) -> HostPage:
        """The page at a host address. Raises: Refusal EFAULT."""
        ...

    async def pin_page(self, hva: int, write: bool) -> PinnedPage:
        """The page at a host address, held until `put`. Raises: Refusal EFAULT."""
        ...

    async def copy_from_user(self, hva: int, size: int) -> bytes:
        """Raises: Refusal EFAULT."""
        ...

    async def copy_to_user(self, hva: int, data: bytes) -> None:
        """Raises: Refusal EFAULT."""
        ...


class IoDevice(Protocol):
    """Something in the kernel that takes a guest's port or MMIO writes, so that they are no exits."""

    def write(self, address: int, size: int, value: int, is_port: bool) -> bool:
        """Whether it took the write."""
        ...

    def close(self) -> None: ...


class KvmEnvironment(NamedTuple):
    """What the kernel around KVM gives it: memory for files, engines for vCPUs, identities, the machine's architectures
    by type of VM, and how long a page's ownership lasts."""

    scheduler: Scheduler
    tracer: Tracer
    identities: IdentityPool
    new_inode: Callable[..., Inode]
    new_engine: Callable[[GuestMemory], Engine]
    huge_orders: tuple[int, ...]
    platforms: Mapping[VmType, Platform]
    lifetime: Lifetime = Lifetime.BINDING


class Kvm:
    """One VM file descriptor's worth. `number` names it in traces."""

    def __init__(
        self,
        environment: KvmEnvironment,
        number: int,
        vm_type: VmType,
        level: AbiLevel,
        mm: HostAddressSpace,
        machine: VirtualMachine | None = None,
    ) -> None:
        """`machine`: the virtual machine that this is the struct kvm of, whose reference it takes over; else a new
        one. Raises: Refusal EBUSY `identity.exhausted`."""
        scheduler = environment.scheduler
        self.environment = environment
        self.scheduler = scheduler
        self.tracer = environment.tracer
        self.number = number
        self.vm_type = vm_type
        self.level = level
        self.mm = mm
        platform = environment.platforms[vm_type]
        self.has_private_memory = platform.has_private_memory  # kvm_arch_has_private_mem()
        self.machine = machine or VirtualMachine(scheduler, environment.identities, platform, environment.lifetime)
        self.lock = Lock(scheduler, LockClass.KVM_LOCK, f"kvm->lock vm {number}")
        self.slots_lock = Lock(scheduler, LockClass.SLOTS_LOCK, f"slots_lock vm {number}")
        self.srcu = Srcu(scheduler, f"kvm->srcu vm {number}")
        self.memslots = SlotTable()
        self.stage2 = Stage2(scheduler, self.tracer, number, self._flush_tlbs)
        self.stage2.page_bit = self.machine.architecture.page_bit
        if self.machine.architecture.has_tables:
            self.stage2.check_access = self._check_access
        self.attributes: Attributes[Gfn] = Attributes(1 << (MAX_PHYSICAL_ADDRESS_BITS - 12), Access.SHARED)
        self.vcpus: dict[int, Vcpu] = {}
        self.created_vcpus = 0  # and those that are being made
        self.dead = False
        self.entered = False  # a vCPU has run
        self.finishing: Task[Any] | None = None  # who ends the launch
        self.migration_in_progress = False
        self.preserved = False  # for a live update: the identity stays where it is
        self.mirror_of: Kvm | None = None
        self.mirrors: list[Kvm] = []
        self.helper_number = 0  # among the identity's struct kvm: 0 the owner's
        self.enabled_hypercalls = 0
        self.io_devices: list[IoDevice] = []
        self.irqchip: dict[int, bytes] | None = None  # KVM_CREATE_IRQCHIP; saved state by chip
        self.split_irqchip = False  # KVM_CAP_SPLIT_IRQCHIP
        self.clock_offset_ns = 0
        self.references = RefCount(scheduler, f"kvm {number}")
        self.destroyed = False
        self.host_invalidations = 0
        self._host_invalidations_over = WaitQueue(scheduler, f"mn_memslots_update_rcuwait vm {number}")
        mm.notifiers.append(self)

    # What kind of VM this is

    @property
    def guest_access_follows_state(self) -> bool:
        """Whether an access that asserts nothing is what the page's state says. So where VMs have private memory: the
        software-protected have no bit to assert with, nor has a script that leaves it out. A default VM's accesses
        are shared. Source: kvm_mmu_page_fault()."""
        return self.has_private_memory

    @property
    def supported_vm_attributes(self) -> int:
        """What KVM_SET_MEMORY_ATTRIBUTES takes, and KVM_CAP_MEMORY_ATTRIBUTES reports: nothing once pages carry their
        state in the file. Source: kvm_supported_mem_attributes(); in-place v8 10/46."""
        tracked_here = self.has_private_memory and not self.level.in_place
        return KVM_MEMORY_ATTRIBUTE_PRIVATE if tracked_here else 0

    @property
    def encryption_initialised(self) -> bool:
        """Whether KVM_SEV_INIT2 or KVM_TDX_INIT_VM was done; of the virtual machine, so it moves along."""
        return self.machine.encryption_initialised

    @encryption_initialised.setter
    def encryption_initialised(self, value: bool) -> None:
        self.machine.encryption_initialised = value

    @property
    def apic_in_kernel(self) -> bool:
        """Source: lapic_in_kernel."""
        return self.irqchip is not None or self.split_irqchip

    @property
    def identity_in_use(self) -> bool:
        """Whether anything names this VM's own identity: memory, a helper, or a guest that has run. One that nothing
        names is a destination for another VM's. Source: sev_guest(), which a destination must not be."""
        used = self.entered or self.encryption_initialised
        return used or self.mirror_of is not None or self.machine.references.value > 1

    def check_alive(self) -> None:
        """Raises: Refusal EIO `ioctl.vm_dead`, as every ioctl does on a VM whose identity has moved away. Source:
        kvm->vm_dead."""
        if self.dead:
            raise Refusal(errno.EIO, "ioctl.vm_dead", vm=self.number)

    # Queries

    def access_of(self, gfn: Gfn, slot: MemorySlot | None) -> Access:
        """Whether a frame is private or shared now. Without slot or live file: shared. Source: kvm_mem_is_private."""
        if not self.level.in_place:
            return self.attributes.get(gfn)
        if slot is None or slot.context is None or not slot.context.file.references.value:
            return Access.SHARED
        index = slot.index_of(gfn)
        inode = slot.context.inode
        return inode.access_at(index) if index < inode.pages else Access.SHARED

    # Memslot updates

    async def swap_memslots(self, table: SlotTable) -> None:
        """Make `table` the one that readers find, and wait until nobody reads the old one.

        Not between the start and the end of a host invalidation: its end must see the slots that its start saw, or
        window counts do not pair up (known bug B30). Source: kvm_swap_active_memslots; 52ac8b358b0c.
        """
        assert self.slots_lock.held_by_me, "memslots swapped without slots_lock"
        await self._host_invalidations_over.wait_until(lambda: not self.host_invalidations)
        self.memslots = table
        await self.srcu.synchronize()

    # Host invalidations (MMU notifier)

    async def invalidate_range_start(self, start: int, end: int) -> None:
        """Host addresses start..end are about to lose their pages: zap the frames that show them."""
        self.host_invalidations += 1
        ranges = self._gfns_of_hvas(start, end)
        if ranges:
            await self.stage2.begin(ranges, (Access.SHARED,))

    async def invalidate_range_end(self, start: int, end: int) -> None:
        if self._gfns_of_hvas(start, end):
            await self.stage2.end()
        self.host_invalidations -= 1
        if not self.host_invalidations:
            self._host_invalidations_over.wake_all()

    def hva_range_of_slot(self, hva: int) -> tuple[int, int] | None:
        """Start and end of the host addresses of a slot that shows `hva`; None if no slot does. Linear in the slots."""
        for slot in self.memslots.by_gfn:
            end = slot.userspace_addr + (slot.gfns.pages << PAGE_SHIFT)
            if slot.userspace_addr <= hva < end and not slot.gmem_only:
                return slot.userspace_addr, end
        return None

    def _gfns_of_hvas(self, start: int, end: int) -> list[Range[Gfn]]:
        slots = (slot for slot in self.memslots.by_gfn if not slot.gmem_only)
        return [gfns for slot in slots if (gfns := slot.gfns_of_hvas(start, end))]

    # Life

    def get(self) -> None:
        self.references.get()

    async def put(self) -> None:
        """One holder less; the last one ends the VM. Never under a lock."""
        if not self.references.put():
            return
        self._destroy()
        if self.mirror_of is not None:
            async with self.mirror_of.lock:
                self.mirror_of.mirrors.remove(self)
            await self.mirror_of.put()

    def _destroy(self) -> None:
        """Source: kvm_destroy_vm. Files pin the VM, so no binding is left by now, and so do helpers."""
        assert not self.mirrors, f"S8: vm {self.number} ends before its helpers"
        self.mm.notifiers.remove(self)
        for slot in self.memslots.by_gfn:
            assert slot.context is None, f"S6: {slot} is bound in a VM that ends"
            slot.freed = True
        self.memslots = SlotTable()
        for vcpu in self.vcpus.values():
            vcpu.engine.close()
        self.vcpus.clear()
        for device in self.io_devices:
            device.close()
        if self.stage2.remote is not None:
            self.stage2.remote.close()
            self.stage2.remote = None
        for table in self.stage2.tables.values():
            table.zap(Range(Gfn(0), Gfn(self.attributes.count)))
        self.destroyed = True
        self.machine.put()

    def kick_vcpus(self) -> None:
        """Nobody is inside the guest. Source: kvm_make_all_cpus_request."""
        for vcpu in self.vcpus.values():
            if vcpu.guest_mode is not None:
                vcpu.guest_mode.kick()

    def check(self) -> None:
        """S5, S6 and the counters of windows, at a quiet moment."""
        for slot in self.memslots.by_gfn:
            assert not slot.freed, f"S6: {slot} is freed and in the table"
            assert slot.context is None or slot in slot.context.bindings, f"S5: {slot} is not in its bindings"
            if slot.context is not None:
                slot.context.check()
        assert not self.stage2.window.open, "S4: a window is open"

    def _check_access(self, gfn: Gfn, pfn: Pfn, order: int, write: bool) -> bool:
        return self.machine.architecture.check_access(gfn, pfn, order, write)

    def _flush_tlbs(self) -> None:
        """And nobody stays inside meanwhile. Source: kvm_flush_remote_tlbs."""
        for vcpu in self.vcpus.values():
            vcpu.engine.flush_tlb()
        self.kick_vcpus()
