"""Vcpu: KVM_RUN. Runs an engine slice by slice, handles what stage 2 missed, and says why it came back.

A slice lasts at most about a millisecond; after each, others may run: that is how vCPUs are serialised, which makes
`lock`-prefixed instructions exact. The loop has no state of its own between two calls but the exit that waits for its
answer.

Source: arch/x86/kvm/x86.c vcpu_enter_guest, vcpu_run; Documentation/virt/kvm/api.rst KVM_RUN.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from guestmem.cpu import engine as cpu
from guestmem.cpu.engine import Engine, GuestMemory
from guestmem.kvm.addresses import gfn_of
from guestmem.kvm.exits import (
    Exit,
    FailEntryExit,
    HltExit,
    HypercallExit,
    InternalErrorExit,
    InterruptedExit,
    IoExit,
    IrqWindowOpenExit,
    LeftExit,
    MemoryFaultExit,
    MmioExit,
    ShutdownExit,
)
from guestmem.kvm.identity import Identity
from guestmem.kvm.mmu import FaultResult, page_fault
from guestmem.kvm.protected import guest_instructions
from guestmem.kvm.protected.guest_mode import GuestMode
from guestmem.kvm.vm import Kvm
from guestmem.memory import PAGE_SHIFT, PAGE_SIZE, Access
from guestmem.sched import Lock, LockClass, Operation, RefCount, park
from guestmem.trace import EHWPOISON, Refusal
from guestmem.trace import events as event
from guestmem.uapi.kvm import KVM_EINVAL, KVM_ENOSYS, KVM_EPERM, KVM_HC_MAP_GPA_RANGE, KVM_MP_STATE_RUNNABLE

_MEMORY_FAULTS = (errno.EFAULT, EHWPOISON)
_U64 = 1 << 64
GP_VECTOR = 13


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
        self.unanswered: IoExit | MmioExit | HypercallExit | None = None
        self.forwarded = False  # `unanswered` is a guest's call that was forwarded: `GuestMode.calls` completes it
        self._begun: cpu.Stop | None = None  # what `run_at_once` met and left
        self.mp_state = KVM_MP_STATE_RUNNABLE
        self.cpuid: cpu.CpuidTable = {}
        self.guest_mode = GuestMode(self) if kvm.machine.architecture.has_vcpus else None
        self.lapic = bytes(1024)  # what KVM_SET_LAPIC left
        kvm.get()

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
        if self.guest_mode is not None or isinstance(self.engine, cpu.RemoteEngine):
            return None
        self.kvm.entered = True
        self._answer()
        stop = self.engine.run()
        match stop:
            case cpu.PortOut() if not self.kvm.io_devices:
                exit_: Exit = IoExit(stop.port, stop.size, True, stop.value)
            case cpu.PortIn():
                exit_ = self._wait_for_answer(IoExit(stop.port, stop.size, False, count=stop.count))
            case _:
                self._begun = stop
                return None
        self._count(exit_)
        return exit_

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
            self.kvm.entered = True
            if self.guest_mode is None:
                stop, self._begun = self._begun or await self.slice(), None
                exit_ = await self._handle(stop)
            else:
                exit_ = await self._handle(await self.guest_mode.run())
            if exit_ is not None:
                return exit_
            await self.kvm.scheduler.cond_resched("vCPU slice")

    async def slice(self) -> cpu.Stop:
        """Run the guest, here for a slice, or where the vCPU is until it stops."""
        engine = self.engine
        return await engine.enter() if isinstance(engine, cpu.RemoteEngine) else engine.run()

    def _answer(self) -> None:
        """Hand the engine what the VMM filled into the last exit."""
        pending, self.unanswered = self.unanswered, None
        if isinstance(pending, HypercallExit):
            self.engine.complete(pending.ret % _U64)
        elif pending is not None:
            self.engine.complete(pending.data)

    async def _handle(self, stop: cpu.Stop | FailEntryExit) -> Exit | None:
        """The exit for a stop; None to go on in the guest."""
        match stop:
            case cpu.SliceOver():
                return None
            case cpu.Stage2Miss():
                return await self._page_fault(stop)
            case cpu.PortOut():
                if self._taken(stop.port, stop.size, stop.value, is_port=True):
                    return None
                return IoExit(stop.port, stop.size, True, stop.value)
            case cpu.PortIn():
                return self._wait_for_answer(IoExit(stop.port, stop.size, False, count=stop.count))
            case cpu.MmioWrite():
                if self._taken(stop.gpa, stop.size, stop.value, is_port=False):
                    return None
                return MmioExit(stop.gpa, stop.size, True, stop.value)
            case cpu.MmioRead():
                return self._wait_for_answer(MmioExit(stop.gpa, stop.size, False))
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
                return IrqWindowOpenExit()
            case cpu.HostFault():
                refusal = Refusal(errno.EFAULT, "user.page", hva=stop.hva, write=stop.write)
                private = self._was_private(stop.gpa, stop.private)
                return MemoryFaultExit(stop.gpa & -PAGE_SIZE, PAGE_SIZE, private, refusal)
            case cpu.Left():
                return LeftExit()
            case cpu.SignalPending():
                return InterruptedExit(by_signal=True)
            case cpu.ReadMsr() | cpu.WriteMsr():
                self.engine.raise_exception(GP_VECTOR, 0)
                return None
            case cpu.Debug():
                return InternalErrorExit(stop.rip, "a debug exit that nobody asked for")
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

    def _taken(self, address: int, size: int, value: int, is_port: bool) -> bool:
        """Whether something in the kernel takes a write, so that it is no exit. Source: kvm_io_bus_write."""
        return any(device.write(address, size, value, is_port) for device in self.kvm.io_devices)

    async def _halt(self) -> Exit:
        """With an interrupt controller in the kernel the vCPU sleeps there; nothing but a signal can wake it here."""
        if not self.kvm.apic_in_kernel:
            return HltExit()
        scheduler = self.kvm.scheduler
        task = scheduler.current
        await park(Operation("halted", f"vcpu {self.number}", lambda: task is None or task.signal_pending))
        return InterruptedExit(by_signal=True)

    async def _page_fault(self, stop: cpu.Stage2Miss) -> Exit | None:
        kvm = self.kvm
        result = "exit"
        try:
            outcome = await page_fault(kvm, stop.gpa, write=stop.write, private=stop.private)
            result = outcome.value
        except Refusal as refusal:
            if refusal.errno not in _MEMORY_FAULTS:
                raise
            return MemoryFaultExit(stop.gpa & -PAGE_SIZE, PAGE_SIZE, self._was_private(stop.gpa, stop.private), refusal)
        finally:
            if kvm.tracer.enabled:
                private = "private" if self._was_private(stop.gpa, stop.private) else "shared"
                kvm.tracer.emit(event.KvmPageFault(kvm.number, self.number, stop.gpa, private, stop.write, result))
        if outcome is FaultResult.MMIO and isinstance(self.engine, cpu.RemoteEngine):
            self.engine.map_mmio(stop.gpa, stop.write)
        elif outcome is FaultResult.MMIO:
            return await self._handle(self.engine.emulate_mmio(stop.gpa, stop.write))
        return None

    def _was_private(self, gpa: int, private: bool | None) -> bool:
        """The access that the guest made: what it asserts, or for a VM that cannot assert, what the state says."""
        if private is not None:
            return private
        kvm = self.kvm
        if not kvm.guest_access_follows_state:
            return False
        gfn = gfn_of(gpa)
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


async def create_vcpu(kvm: Kvm, number: int, new_engine: Callable[[GuestMemory], Engine] | None = None) -> Vcpu:
    """KVM_CREATE_VCPU; `new_engine` where the machine's own is not wanted.

    Raises: Refusal EIO `ioctl.vm_dead`; EEXIST `vcpu.exists`.

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
        make = new_engine or kvm.environment.new_engine
        vcpu = Vcpu(kvm, number, make(kvm.stage2), identity)
        kvm.vcpus[number] = vcpu
        return vcpu
