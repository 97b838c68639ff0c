"""Guest mode: how a vCPU that hardware or firmware knows goes into the guest, and is thrown out of it.

    look at the request -> VMRUN, TDH.VP.ENTER, ... -> slices -> an exit, or a kick -> look at the request ...

A vCPU stays inside from one slice to the next and comes out at an exit. Who changes what it may have cached kicks it:
it is out at once, since nothing runs between two awaits, and enters again before its next slice. One that has looked at
its requests and has not entered yet cannot be thrown out: it enters, leaves at once and looks again. Who needs that to
have happened waits for it (KVM_REQUEST_WAIT, known bug B45).

There is one request: the page that the vCPU's state is in is to be looked up again (`state_page.py`).

Source: arch/x86/kvm/x86.c vcpu_enter_guest, vcpu_block; Documentation/virt/kvm/vcpu-requests.rst; 309d28576f0a.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from guestmem.arch import FirmwareError
from guestmem.cpu.engine import Halt, Pvalidate, Rmpadjust, SliceOver, Stop, Tdcall
from guestmem.kvm.exits import FailEntryExit
from guestmem.kvm.protected import state_page
from guestmem.kvm.protected.guest_calls import GUEST_CALLS
from guestmem.kvm.protected.tdcall import VP_VMCALL
from guestmem.sched import Operation, park
from guestmem.trace import Refusal
from guestmem.uapi.kvm import KVM_MP_STATE_RUNNABLE

if TYPE_CHECKING:
    from guestmem.arch import GuestArchitecture
    from guestmem.kvm.vcpu import Vcpu

_VCPU_BITS = 16  # more than KVM_MAX_VCPU_IDS


class GuestMode:
    """Of one vCPU.

    `entering`: it has looked at its request (vcpu->mode is IN_GUEST_MODE). `requested` is
    KVM_REQ_UPDATE_PROTECTED_GUEST_STATE. `waiting_for_reset`: the page at `state_gpa` is to be its state, None for
    none, once it is reset.
    """

    def __init__(self, vcpu: Vcpu) -> None:
        self.vcpu = vcpu
        self.entering = False
        self.requested = False
        self.waiting_for_reset = False
        self.state_gpa: int | None = None
        self.state_loaded = True
        new_calls = GUEST_CALLS.get(vcpu.kvm.vm_type)
        self.calls = new_calls(vcpu) if new_calls is not None else None

    @property
    def number(self) -> int:
        """Its name to the architecture: no other vCPU of the identity has it, of whichever struct kvm. It is that of
        the vCPU which has the same number in the struct kvm that the identity moves to."""
        return self.vcpu.number | self.vcpu.kvm.helper_number << _VCPU_BITS

    @property
    def architecture(self) -> GuestArchitecture:
        """It moves with the identity."""
        return self.vcpu.kvm.machine.architecture

    @property
    def _may_be_requested(self) -> bool:
        """Whether anybody can: another vCPU, or who takes its page. Else nothing can come between look and entry."""
        pages = self.architecture.state_pages
        return pages is not None and (len(self.vcpu.kvm.vcpus) > 1 or pages.gfn(self.number) is not None)

    @property
    def _waits(self) -> bool:
        """Whether the guest has still to make it run, or has ended it."""
        return self.architecture.state_pages is not None and self.vcpu.mp_state != KVM_MP_STATE_RUNNABLE

    async def run(self) -> Stop | FailEntryExit:
        """One slice, from inside the guest. Raises: Refusal EINVAL `run.no_vcpu`."""
        while self.number not in self.architecture.inside:
            not_entered = await self._enter()
            if not_entered is not None:
                return not_entered
        stop = await self.vcpu.slice()
        if _is_exit(stop):
            self.leave()
        return stop

    async def _enter(self) -> Stop | FailEntryExit | None:
        """Try to; None to go on if it is inside, and to try again if not."""
        self.entering = True
        if self.requested or self._waits:
            self.entering = False
            return await self._update_or_block()
        if self._may_be_requested:
            await self.vcpu.kvm.scheduler.preempt("request looked at, guest not entered")
        try:
            self.architecture.enter(self.number)
        except FirmwareError as error:
            self.entering = False
            if "no_vcpu" in error.facts:
                raise Refusal(errno.EINVAL, "run.no_vcpu", call=error.call, code=error.code) from error
            return FailEntryExit(error.call, error.code)
        self._load_state()
        if self.requested:  # the kick that came meanwhile
            self.leave()
        return None

    async def _update_or_block(self) -> Stop | None:
        """Nobody but userspace can wait without an interrupt controller in the kernel: to it the vCPU halts."""
        if self.requested:
            self.requested = False
            await state_page.update(self.vcpu, self)
            return None
        if self.vcpu.kvm.irqchip is None:
            return Halt()
        task = self.vcpu.kvm.scheduler.current
        await park(
            Operation("halted", f"vcpu {self.number}", lambda: self.requested or (task is None or task.signal_pending))
        )
        return None if self.requested else SliceOver()

    def leave(self) -> None:
        """An exit."""
        if self.number in self.architecture.inside:
            self.architecture.leave(self.number)
            self._save_state()
        self.entering = False

    def take_over(self, other: GuestMode) -> None:
        """The identity has come from another struct kvm, and what its vCPU of this number was asked. A page that the
        guest made holds its registers; those in KVM's own page are in the engine, so they are the VMM's to bring."""
        pages = self.architecture.state_pages
        self.requested, self.waiting_for_reset = other.requested, other.waiting_for_reset
        self.state_gpa, self.state_loaded = other.state_gpa, pages is None or pages.gfn(self.number) is None
        self.vcpu.mp_state = other.vcpu.mp_state

    def kick(self) -> None:
        """Throw it out, if it is inside."""
        if self.number in self.architecture.inside:
            self.leave()

    async def request(self) -> None:
        """kvm_make_request_and_kick: the vCPU looks its page up before it enters again. Returns when it is outside, and
        has not looked at its requests before this one."""
        self.requested = True
        self.kick()
        if self.entering:
            await park(Operation("kicked", f"vcpu {self.number}", lambda: not self.entering))

    def _load_state(self) -> None:
        """VMRUN, the first time with a page that the guest made."""
        pages = self.architecture.state_pages
        if not self.state_loaded and pages is not None:
            regs, sregs = pages.load(self.number)
            self.vcpu.engine.set_regs(regs)
            self.vcpu.engine.set_sregs(sregs)
            self.state_loaded = True

    def _save_state(self) -> None:
        pages = self.architecture.state_pages
        if pages is not None and pages.gfn(self.number) is not None:
            pages.save(self.number, self.vcpu.engine.get_regs(), self.vcpu.engine.get_sregs())


def _is_exit(stop: Stop) -> bool:
    """The CPU executes PVALIDATE and RMPADJUST, and the module every TDCALL but TDG.VP.VMCALL, from inside."""
    if isinstance(stop, Tdcall):
        return stop.leaf == VP_VMCALL
    return not isinstance(stop, SliceOver | Pvalidate | Rmpadjust)
