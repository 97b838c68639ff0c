"""B49, 15945e9ec195: a TD changes its state while a vCPU is run or made."""

from typing import Any

from guestmem.arch import FirmwareError
from guestmem.check.mutants import mutant
from guestmem.kvm.protected.launch import _check_launching, _state
from guestmem.kvm.vm import Kvm
from guestmem.trace import Refusal


@mutant("B49", replaces="guestmem.kvm.protected.launch:launch_finish", breaks={"S18", "S12"})
async def finalized_under_slots_lock(kvm: Kvm, parameters: Any = None) -> bytes:
    """Only slots_lock is taken."""
    kvm.check_alive()
    async with kvm.slots_lock:
        _check_launching(kvm)
        kvm.finishing = kvm.scheduler.current
        try:
            states = {number: _state(kvm.vcpus[number]) for number in sorted(kvm.vcpus)}
            await kvm.scheduler.preempt("vCPU state read, launch not finished")
            return kvm.machine.architecture.finalize(states, parameters)
        except FirmwareError as error:
            raise Refusal(error.answer, "launch.finish", call=error.call, code=error.code) from error
        finally:
            kvm.finishing = None
