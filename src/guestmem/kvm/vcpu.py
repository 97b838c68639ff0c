"""Vcpu: KVM_RUN. Runs an engine slice by slice, handles what stage 2 missed, and says why it came back.

A slice lasts at most about a millisecond; after each, others may run: that is how vCPUs are serialised, which makes
`lock`-prefixed instructions exact. The loop has no state of its own between two calls but the exit that waits for its
answer.

Source: arch/x86/kvm/x86.c vcpu_enter_guest, vcpu_run; Documentation/virt/kvm/api.rst KVM_RUN.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from guestmem.cpu import cpuid
from guestmem.cpu import engine as cpu
from guestmem.cpu.engine import Engine
from guestmem.kvm import msr_access
from guestmem.kvm.addresses import gfn_of
from guestmem.kvm.exits import (
    DebugExit,
    Exit,
    FailEntryExit,
    HltExit,
    HypercallExit,
    InternalErrorExit,
    InterruptedExit,
    IoapicEoiExit,
    IoExit,
    IrqWindowOpenExit,
    MemoryFaultExit,
    MmioExit,
    MsrExit,
    ShutdownExit,
    UninitializedExit,
)
from guestmem.kvm.identity import Identity
from guestmem.kvm.irqchip.lapic import Lapic
from guestmem.kvm.kvmclock import VcpuClock
from guestmem.kvm.mce import MachineCheck
from guestmem.kvm.mmu import FaultResult, page_fault
from guestmem.kvm.protected import guest_instructions
from guestmem.kvm.protected.guest_mode import GuestMode
from guestmem.kvm.vcpu_devices import VcpuDevices
from guestmem.kvm.vcpu_interrupts import VcpuInterrupts
from guestmem.kvm.vcpu_msrs import stops
from guestmem.kvm.vm import Kvm
from guestmem.memory import PAGE_SHIFT, PAGE_SIZE, Access
from guestmem.sched import Lock, LockClass, Operation, RefCount, park
from guestmem.trace import EHWPOISON, Refusal
from guestmem.trace import events as event
from guestmem.uapi.kvm import (
    KVM_EINVAL,
    KVM_ENOSYS,
    KVM_EPERM,
    KVM_HC_MAP_GPA_RANGE,
    KVM_MP_STATE_HALTED,
    KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_UNINITIALIZED,
)

_MEMORY_FAULTS = (errno.EFAULT, EHWPOISON)
_U64 = 1 << 64
_CPUID_X2APIC, _CPUID_TSC_DEADLINE = 1 << 21, 1 << 24
_DEVICES_IN_A_ROW = 32
"""Accesses to controllers after which others may run, though the slice is not over."""


class Vcpu:
    """One virtual CPU of `kvm`, which it holds. `immediate_exit` is the field of struct kvm_run.

    `unanswered` is the exit whose answer the next run takes: its `data` or `ret`. `identity` is the one that its state
    was made for (a VMSA, a TDVPR), and moves with the virtual machine's.
    """

    def __init__(self, kvm: Kvm, number: int, engine: Engine, identity: Identity) -> None:
        self.kvm = kvm
        self.identity = identity
        self.number = number
        self.engine = engine
        self.mutex = Lock(kvm.scheduler, LockClass.VCPU_MUTEX, f"vcpu->mutex {number} vm {kvm.number}")
        self.immediate_exit = False
        self.exits = 0
        self.references = RefCount(kvm.scheduler, f"vcpu {number} vm {kvm.number}")
        self.unanswered: IoExit | MmioExit | HypercallExit | MsrExit | None = None
        self.forwarded = False  # `unanswered` is a guest's call that was forwarded: `GuestMode.calls` completes it
        self._begun: cpu.Stop | None = None  # what `run_at_once` met and left
        self.mp_state = KVM_MP_STATE_RUNNABLE
        self.cpuid: cpu.CpuidTable = {}
        self.guest_mode = GuestMode(self) if kvm.machine.architecture.has_vcpus else None
        self.interrupts = VcpuInterrupts(self)
        self.clock = VcpuClock(self)
        self.devices = VcpuDevices(self)
        self._devices_in_a_row = 0
        self.machine_check = MachineCheck()
        self.triple_fault = False  # KVM_REQ_TRIPLE_FAULT
        self._create_lapic()
        self.msr_stops = stops(self)
        msr_access.update_stops(self)
        kvm.get()

    @property
    def lapic(self) -> Lapic | None:
        """Its local APIC, where that is in the kernel."""
        return self.interrupts.lapic

    def _create_lapic(self) -> None:
        """A processor that is not the bootstrap's waits for INIT; one that hardware starts by other means (an SNP
        guest's, a TD's) does not wait here. Source: kvm_arch_vcpu_create."""
        irqchip, is_bsp = self.kvm.irqchip, self.number == self.kvm.bsp_vcpu_id
        if irqchip is None:
            return
        self.interrupts.lapic = irqchip.new_lapic(self.number, self.interrupts, is_bsp)
        if not is_bsp and self.guest_mode is None:
            self.mp_state = KVM_MP_STATE_UNINITIALIZED

    def set_cpuid(self, table: cpu.CpuidTable) -> None:
        """KVM_SET_CPUID2. Source: kvm_vcpu_after_set_cpuid."""
        self.cpuid = table
        self.engine.set_cpuid(table)
        if self.lapic is not None:
            features = cpuid.lookup(table, 1, 0)[2]
            self.lapic.has_x2apic = bool(features & _CPUID_X2APIC)
            self.lapic.has_tsc_deadline = bool(features & _CPUID_TSC_DEADLINE)

    def get(self) -> None:
        self.references.get()

    async def put(self) -> None:
        """One descriptor less. The vCPU lives on in its VM, which ends when nobody holds it."""
        if self.references.put():
            await self.kvm.put()

    async def run(self) -> Exit:
        """Enter the guest and come back with the reason for the exit.

        Raises: Refusal for what KVM_RUN fails with besides EINTR and memory faults (ENOMEM, EIO); EINVAL
        `run.not_launched`, `run.no_vcpu`.
        """
        async with self.mutex:
            if not self.kvm.machine.architecture.launched:
                await self._wait_for_launch()
            try:
                exit_ = await self._complete_forwarded() if self.forwarded else None
                exit_ = exit_ or await self._run()
            finally:
                if self.guest_mode is not None:
                    self.guest_mode.leave()
        self._count(exit_)
        return exit_

    def run_at_once(self) -> Exit | None:
        """`run` without a task, for a server's commonest calls: one slice, if it ends with a port access or MMIO.

        None if it takes more than that: `run` then goes on from here. Nothing else runs meanwhile, so nobody can see
        that the mutex was not taken.
        """
        if self.mutex.owner is not None or self.immediate_exit or self._begun is not None or self.kvm.dead:
            return None
        if self.guest_mode is not None or self.mp_state != KVM_MP_STATE_RUNNABLE:
            return None
        self.kvm.scheduler.timers.fire_due()
        if self._has_requests:
            return None
        self.kvm.entered = True
        self._answer()
        self.interrupts.inject()
        stop = self.engine.run()
        match stop:
            case cpu.PortOut() if not self.kvm.io_devices and not self.devices.has_port(stop.port):
                exit_: Exit = IoExit(stop.port, stop.size, True, stop.value)
            case cpu.PortIn() if not self.devices.has_port(stop.port):
                exit_ = self._wait_for_answer(IoExit(stop.port, stop.size, False, count=stop.count))
            case _:
                self._begun = stop
                return None
        self._count(exit_)
        return exit_

    @property
    def _has_requests(self) -> bool:
        """Whether `_run` has something to do before the guest goes on."""
        asked = self.interrupts
        return self.triple_fault or asked.eoi_exit is not None or asked.has_start_event() or self.clock.needs_update

    async def _wait_for_launch(self) -> None:
        """Another may be about to finish it. Source: pre_sev_run, without a VMSA; tdx_vcpu_pre_run."""
        await self.kvm.scheduler.preempt("vCPU loaded, not launched")
        if not self.kvm.machine.architecture.launched:
            raise Refusal(errno.EINVAL, "run.not_launched", vm=self.kvm.number)

    def _count(self, exit_: Exit) -> None:
        self.exits += 1
        if self.kvm.tracer.enabled:
            self.kvm.tracer.emit(event.KvmExit(self.kvm.number, self.number, type(exit_).__name__))

    async def _run(self) -> Exit:
        self._answer()
        while True:
            if self.immediate_exit:
                return InterruptedExit()
            if self.kvm.scheduler.signal_pending:
                return InterruptedExit(by_signal=True)
            self.kvm.check_alive()
            if self.triple_fault:
                self.triple_fault = False
                return ShutdownExit()
            stop: cpu.Stop | FailEntryExit | None
            stop, self._begun = self._begun, None
            if stop is None:  # else it has run already, and what it met comes before anything new
                exit_ = await self._prepare_to_enter()
                if exit_ is not None:
                    return exit_
                self.kvm.entered = True
                stop = self.engine.run() if self.guest_mode is None else await self.guest_mode.run()
            exit_ = await self._handle(stop)
            if exit_ is not None:
                return exit_
            if self._devices_in_a_row % _DEVICES_IN_A_ROW == 0:
                await self.kvm.scheduler.cond_resched("vCPU slice")

    async def _prepare_to_enter(self) -> Exit | None:
        """What was asked of the vCPU before it goes on, from outside and by its own guest. Source: the requests of
        vcpu_enter_guest, vcpu_block."""
        self.kvm.scheduler.timers.fire_due()
        interrupts = self.interrupts
        if interrupts.eoi_exit is not None:
            vector, interrupts.eoi_exit = interrupts.eoi_exit, None
            return IoapicEoiExit(vector)
        if self.guest_mode is None and (self.mp_state != KVM_MP_STATE_RUNNABLE or interrupts.has_start_event()):
            exit_ = await self._wait_until_runnable()
            if exit_ is not None:
                return exit_
        if self.clock.needs_update:
            await self.clock.update()
        interrupts.inject()
        return None

    async def _wait_until_runnable(self) -> Exit | None:
        """HLT, and a processor that has not been started. Source: kvm_arch_vcpu_ioctl_run, vcpu_block."""
        interrupts, was_uninitialized = self.interrupts, self.mp_state == KVM_MP_STATE_UNINITIALIZED
        while True:
            interrupts.accept_start_events()
            if was_uninitialized and self.mp_state != KVM_MP_STATE_UNINITIALIZED:
                return UninitializedExit()
            halted = self.mp_state == KVM_MP_STATE_HALTED
            if halted and interrupts.wakes():
                self.mp_state = KVM_MP_STATE_RUNNABLE
            if self.mp_state == KVM_MP_STATE_RUNNABLE:
                return None
            if not await self._sleep(interrupts.wakes if halted else interrupts.has_start_event):
                return InterruptedExit(by_signal=True)

    async def _sleep(self, wakes: Callable[[], bool]) -> bool:
        """Until `wakes()`, or a signal; whether it was not the signal."""
        task = self.kvm.scheduler.current
        await park(Operation("halted", f"vcpu {self.number}", lambda: wakes() or task is None or task.signal_pending))
        return task is not None and not task.signal_pending

    def _answer(self) -> None:
        """Hand the engine what the VMM filled into the last exit."""
        pending, self.unanswered = self.unanswered, None
        if isinstance(pending, HypercallExit):
            self.engine.complete(pending.ret % _U64)
        elif isinstance(pending, MsrExit):
            msr_access.answered(self, pending)
        elif pending is not None:
            self.engine.complete(pending.data)

    async def _handle(self, stop: cpu.Stop | FailEntryExit) -> Exit | None:
        """The exit for a stop; None to go on in the guest."""
        if not self._is_kernels_own(stop):
            self._devices_in_a_row = 0
        elif not self.kvm.scheduler.explores:
            self._devices_in_a_row += 1
        match stop:
            case cpu.SliceOver():
                return None
            case cpu.Stage2Miss():
                return await self._page_fault(stop)
            case cpu.PortOut():
                if self.devices.write_port(stop):
                    return None
                return IoExit(stop.port, stop.size, True, stop.value)
            case cpu.PortIn():
                if self.devices.read_port(stop):
                    return None
                return self._wait_for_answer(IoExit(stop.port, stop.size, False, count=stop.count))
            case cpu.MmioWrite():
                if self.devices.write_mmio(stop):
                    return None
                return MmioExit(stop.gpa, stop.size, True, stop.value)
            case cpu.MmioRead():
                if self.devices.read_mmio(stop):
                    return None
                return self._wait_for_answer(MmioExit(stop.gpa, stop.size, False))
            case cpu.ReadMsr() | cpu.WriteMsr():
                return self._wait_for_msr(msr_access.access(self, stop))
            case cpu.Debug():
                return DebugExit(stop.vector, stop.rip, stop.dr6, stop.dr7)
            case cpu.Hypercall():
                return self._hypercall(stop)
            case cpu.Pvalidate() | cpu.Rmpadjust():
                return await guest_instructions.execute(self, stop, self.engine.complete)
            case cpu.Vmgexit() | cpu.Tdcall():
                return await self._guest_call(stop)
            case cpu.Halt():
                return await self._halt()
            case cpu.Shutdown():
                return ShutdownExit()
            case cpu.InterruptWindow():
                return IrqWindowOpenExit() if self.interrupts.window_opened() else None
            case cpu.HostFault():
                return self._host_fault(stop)
            case cpu.Failed():
                return InternalErrorExit(stop.rip, stop.why)
            case FailEntryExit():
                return stop

    async def _guest_call(self, stop: cpu.Vmgexit | cpu.Tdcall) -> Exit | None:
        calls = self.guest_mode.calls if self.guest_mode is not None else None
        if calls is None or not isinstance(stop, calls.handles):
            return InternalErrorExit(self.engine.get_regs().rip, f"{type(stop).__name__} in a VM without it")
        return self._forward(await calls.handle(stop))

    async def _complete_forwarded(self) -> Exit | None:
        """Source: vcpu->arch.complete_userspace_io."""
        pending = self.unanswered
        assert isinstance(pending, HypercallExit)
        assert self.guest_mode is not None and self.guest_mode.calls is not None
        self.unanswered, self.forwarded = None, False
        return self._forward(await self.guest_mode.calls.complete(pending.ret))

    def _forward(self, exit_: Exit | None) -> Exit | None:
        if isinstance(exit_, HypercallExit):
            self.unanswered, self.forwarded = exit_, True
        return exit_

    def _wait_for_answer(self, exit_: IoExit | MmioExit | HypercallExit) -> Exit:
        self.unanswered = exit_
        return exit_

    async def _halt(self) -> Exit | None:
        """With an APIC in the kernel the vCPU sleeps there. A protected one's MP state says who started it, and not
        that it sleeps. Source: __kvm_emulate_halt."""
        if not self.kvm.apic_in_kernel:
            return HltExit()
        if self.guest_mode is None:
            self.mp_state = KVM_MP_STATE_HALTED
            return None
        return None if await self._sleep(self.interrupts.wakes) else InterruptedExit(by_signal=True)

    @staticmethod
    def _is_kernels_own(stop: cpu.Stop | FailEntryExit) -> bool:
        """A stop that costs the guest little and comes often: others need not run after each."""
        return isinstance(stop, cpu.PortOut | cpu.PortIn | cpu.MmioRead | cpu.MmioWrite | cpu.ReadMsr | cpu.WriteMsr)

    def _wait_for_msr(self, exit_: MsrExit | None) -> MsrExit | None:
        if exit_ is not None:
            self.unanswered = exit_
        return exit_

    async def _page_fault(self, stop: cpu.Stage2Miss) -> Exit | None:
        kvm = self.kvm
        if self.devices.at(stop.gpa) and kvm.memslots.find(gfn_of(stop.gpa)) is None:
            return await self._handle(self.engine.emulate_mmio(stop.gpa, stop.write))
        result = "exit"
        try:
            outcome = await page_fault(kvm, stop.gpa, write=stop.write, private=stop.private)
            result = outcome.value
        except Refusal as refusal:
            if refusal.errno not in _MEMORY_FAULTS:
                raise
            return MemoryFaultExit(stop.gpa & -PAGE_SIZE, PAGE_SIZE, self._was_private(stop), refusal)
        finally:
            if kvm.tracer.enabled:
                private = "private" if self._was_private(stop) else "shared"
                kvm.tracer.emit(event.KvmPageFault(kvm.number, self.number, stop.gpa, private, stop.write, result))
        if outcome is FaultResult.MMIO:
            return await self._handle(self.engine.emulate_mmio(stop.gpa, stop.write))
        return None

    def _host_fault(self, stop: cpu.HostFault) -> Exit:
        """The memory of a slot that cannot be touched. Source: hva_to_pfn_slow, kvm_handle_error_pfn."""
        refusal = Refusal(errno.EFAULT, "user.page", gpa=stop.gpa, write=stop.write)
        gfn = gfn_of(stop.gpa)
        private = self.kvm.access_of(gfn, self.kvm.memslots.find(gfn)) is Access.PRIVATE
        return MemoryFaultExit(stop.gpa & -PAGE_SIZE, PAGE_SIZE, private, refusal)

    def _was_private(self, stop: cpu.Stage2Miss) -> bool:
        """The access that the guest made: what it asserts, or for a VM that cannot assert, what the state says."""
        if stop.private is not None:
            return stop.private
        kvm = self.kvm
        if not kvm.guest_access_follows_state:
            return False
        gfn = gfn_of(stop.gpa)
        return kvm.access_of(gfn, kvm.memslots.find(gfn)) is Access.PRIVATE

    def _hypercall(self, call: cpu.Hypercall) -> Exit | None:
        """Source: arch/x86/kvm/x86.c ____kvm_emulate_hypercall."""
        kvm = self.kvm
        gpa, pages, attributes, _ = call.args
        if kvm.tracer.enabled:
            kvm.tracer.emit(event.KvmHypercall(kvm.number, self.number, call.nr, gpa, pages, attributes))
        if call.cpl:
            self.engine.complete(-KVM_EPERM % _U64)
        elif call.nr != KVM_HC_MAP_GPA_RANGE or not kvm.enabled_hypercalls >> call.nr & 1:
            self.engine.complete(-KVM_ENOSYS % _U64)
        elif gpa % PAGE_SIZE or not pages or (gpa >> PAGE_SHIFT) + pages >= _U64:
            self.engine.complete(-KVM_EINVAL % _U64)
        else:
            return self._wait_for_answer(HypercallExit(call.nr, (gpa, pages, attributes)))
        return None


async def create_vcpu(kvm: Kvm, number: int) -> Vcpu:
    """KVM_CREATE_VCPU. Raises: Refusal EIO `ioctl.vm_dead`; EEXIST `vcpu.exists`.

    A vCPU is counted, then made with no lock held, then put online; a move of the identity in between would leave it
    with the wrong one, so it looks at both counts (known bug B43). Source: kvm_vm_ioctl_create_vcpu.
    """
    kvm.check_alive()
    async with kvm.lock:
        kvm.created_vcpus += 1
    identity = kvm.machine.identity
    await kvm.scheduler.preempt("vCPU made, not online yet")
    async with kvm.lock:
        if number in kvm.vcpus:
            kvm.created_vcpus -= 1
            raise Refusal(errno.EEXIST, "vcpu.exists", vcpu=number)
        vcpu = Vcpu(kvm, number, kvm.environment.new_engine(kvm.stage2), identity)
        kvm.vcpus[number] = vcpu
        return vcpu
