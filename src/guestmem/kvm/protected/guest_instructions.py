"""The instructions of a protected guest about its pages: PVALIDATE, RMPADJUST, TDG.MEM.PAGE.ACCEPT.

The CPU, or the module, executes them without an exit. What stage 2 does not map is a nested page fault, as for any
other access, and the instruction is repeated; a page whose entry is larger than the instruction wants is split first.

Source: arch/x86/kvm/svm/sev.c sev_handle_rmp_fault; APM volume 3.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING

from guestmem.arch import FirmwareError
from guestmem.arch.architecture import Done, Faults, GuestInstruction, Raises
from guestmem.kvm.addresses import Gfn, gfn_of
from guestmem.kvm.exits import Exit, MemoryFaultExit
from guestmem.kvm.mmu import page_fault
from guestmem.kvm.stage2 import Leaf
from guestmem.memory import PAGE_SIZE, Access, Pfn, Range
from guestmem.memory.pages import block
from guestmem.trace import EHWPOISON, Refusal

if TYPE_CHECKING:
    from guestmem.kvm.vcpu import Vcpu


async def execute(vcpu: Vcpu, instruction: GuestInstruction, done: Callable[[int], None]) -> Exit | None:
    """Execute it, or have it repeated, or raise what it raises; `done` takes its value. An exit for a page that the
    guest cannot have."""
    kvm = vcpu.kvm
    gfn = gfn_of(instruction.gpa)
    leaf = kvm.stage2.lookup(gfn, Access.PRIVATE)
    at = None if leaf is None else (Pfn(leaf.pfn + gfn - leaf.gfn), leaf.order)
    match kvm.machine.architecture.execute(instruction, at):
        case Done(value):
            done(value)
        case Raises(vector, error_code):
            vcpu.engine.raise_exception(vector, error_code)
        case Faults(smaller):
            return await _fault(vcpu, gfn, leaf, smaller)
    return None


async def _fault(vcpu: Vcpu, gfn: Gfn, leaf: Leaf | None, smaller: bool) -> Exit | None:
    gpa = gfn * PAGE_SIZE
    if vcpu.guest_mode is not None:
        vcpu.guest_mode.leave()
    try:
        if leaf is None:
            await page_fault(vcpu.kvm, gpa, write=True, private=True, accessed=False)
        elif smaller:
            await _split(vcpu, leaf)
        else:
            raise Refusal(errno.EFAULT, "arch.guest_access", gpa=gpa, pfn=leaf.pfn)
    except Refusal as refusal:
        if refusal.errno not in (errno.EFAULT, EHWPOISON):
            raise
        return MemoryFaultExit(gpa, PAGE_SIZE, True, refusal)
    return None


async def _split(vcpu: Vcpu, leaf: Leaf) -> None:
    """PSMASH, and the leaf goes: it comes back in the size of the entries. One that others have split is no error."""
    kvm = vcpu.kvm
    async with kvm.stage2.mmu_lock:
        if kvm.stage2.lookup(leaf.gfn, Access.PRIVATE) != leaf:
            return
        order = leaf.order or max(kvm.environment.huge_orders, default=0)
        try:
            kvm.machine.architecture.split(block(leaf.gfn, order).start, order)
        except FirmwareError as error:
            raise Refusal(errno.EFAULT, "arch.guest_access", gpa=leaf.gfn * PAGE_SIZE, code=error.code) from error
        kvm.stage2.zap(Range(leaf.gfn, Gfn(leaf.gfn + (1 << leaf.order))), (Access.PRIVATE,))
        await kvm.stage2.flush_remote()
