"""PVALIDATE and RMPADJUST as the CPU executes them: by the RMP, through what stage 2 maps at the address.

Source: APM volume 3, PVALIDATE, RMPADJUST; volume 2, 15.36.9 (#VC with PAGE_NOT_VALIDATED, exit code 404h) and table
15-41 (nested page faults).
"""

from __future__ import annotations

from guestmem.arch.architecture import UNDEFINED, Accept, Done, Faults, GuestInstruction, Outcome, Raises
from guestmem.arch.snp.rmp import Fault, Rmp, Status
from guestmem.cpu.engine import Pvalidate
from guestmem.memory import PAGE_SHIFT, Pfn

_GP, _VC = 13, 29
_PAGE_NOT_VALIDATED = 0x404
_CARRY = 32


def execute(rmp: Rmp, asid: int, instruction: GuestInstruction, leaf: tuple[Pfn, int] | None) -> Outcome:
    """By a guest at VMPL0. The value is EAX, with the carry flag of PVALIDATE in bit 32."""
    if isinstance(instruction, Accept):
        return UNDEFINED
    if leaf is None:
        return Faults()
    pfn, order = leaf
    gfn, large = instruction.gpa >> PAGE_SHIFT, instruction.large
    if large and not order:
        return Done(Status.FAIL_SIZEMISMATCH)
    if isinstance(instruction, Pvalidate):
        answer = rmp.pvalidate(asid, gfn, pfn, large=large, validate=instruction.validate)
        if isinstance(answer, tuple):
            return Done(answer[0] | answer[1] << _CARRY)
        return _fault(answer)
    status = rmp.rmpadjust(
        asid,
        gfn,
        pfn,
        large=large,
        target=instruction.target,
        permissions=instruction.permissions,
        vmsa=instruction.vmsa,
    )
    return _fault(status) if isinstance(status, Fault) else Done(status)


def _fault(fault: Fault) -> Outcome:
    if fault is Fault.NOT_VALIDATED:
        return Raises(_VC, _PAGE_NOT_VALIDATED)
    if fault is Fault.GENERAL_PROTECTION:
        return Raises(_GP)
    return Faults(smaller=fault is Fault.NPF_SIZE)
