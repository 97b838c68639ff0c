"""Guest mode: how a vCPU that hardware or firmware knows goes into the guest, and is thrown out of it.

    look at the requests -> VMRUN, TDH.VP.ENTER, ... -> slices -> an exit, or a kick -> look at the requests ...

A vCPU stays inside from one slice to the next and comes out at an exit. Who changes what it may have cached kicks it:
it is out at once, since nothing runs between two awaits, and enters again before its next slice. One that has looked at
its requests and has not entered yet cannot be thrown out: it enters, leaves at once and looks again. Who needs that to
have happened waits for it (KVM_REQUEST_WAIT, known bug B45).

Source: arch/x86/kvm/x86.c vcpu_enter_guest; Documentation/virt/kvm/vcpu-requests.rst.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from guestmem.arch import FirmwareError
from guestmem.cpu.engine import Engine, Pvalidate, Rmpadjust, SliceOver, Stop
from guestmem.kvm.exits import FailEntryExit
from guestmem.trace import Refusal

if TYPE_CHECKING:
    from guestmem.kvm.vm import Kvm

_NO_EXIT = (SliceOver, Pvalidate, Rmpadjust)


class GuestMode:
    """Of one vCPU. `entering`: it has looked at its requests (vcpu->mode is IN_GUEST_MODE)."""

    def __init__(self, kvm: Kvm, number: int) -> None:
        self.kvm = kvm
        self.number = number if kvm.mirror_of is None else ~number
        self.entering = False

    async def run(self, engine: Engine) -> Stop | FailEntryExit:
        """One slice, from inside the guest. Raises: Refusal EINVAL `run.no_vcpu`."""
        failed = await self._enter()
        if failed is not None:
            return failed
        stop = engine.run()
        if not isinstance(stop, _NO_EXIT):
            self.leave()
        return stop

    async def _enter(self) -> FailEntryExit | None:
        architecture = self.kvm.machine.architecture
        if self.number in architecture.inside:
            return None
        self.entering = True
        await self.kvm.scheduler.preempt("requests looked at, guest not entered")
        try:
            architecture.enter(self.number)
        except FirmwareError as error:
            self.entering = False
            if "no_vcpu" in error.facts:
                raise Refusal(errno.EINVAL, "run.no_vcpu", call=error.call, code=error.code) from error
            return FailEntryExit(error.call, error.code)
        return None

    def leave(self) -> None:
        """An exit."""
        self.kvm.machine.architecture.leave(self.number)
        self.entering = False

    def kick(self) -> None:
        """Throw it out, if it is inside."""
        if self.number in self.kvm.machine.architecture.inside:
            self.leave()
