"""TDCALL: what a TD asks of the module, and through TDG.VP.VMCALL of KVM.

The module does TDG.MEM.PAGE.ACCEPT; leaves that it has and this one has not are an invalid operand. R10 and R11 of a
VMCALL say which subfunction, R12 and so on its arguments; R10 is its status, R11 more.

Source: arch/x86/kvm/vmx/tdx.c handle_tdvmcall, tdx_map_gpa, tdx_complete_vmcall_map_gpa, tdx_get_td_vm_call_info,
tdx_report_fatal_error; Intel TDX GHCI, TDG.VP.VMCALL; TDX module ABI specification, TDCALL leaves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from guestmem.arch.architecture import Accept
from guestmem.arch.tdx import platform
from guestmem.arch.tdx.status import Operand, Status
from guestmem.cpu.engine import Tdcall
from guestmem.cpu.registers import Regs
from guestmem.kvm.exits import Exit, HypercallExit, SystemEventExit
from guestmem.kvm.protected import guest_instructions
from guestmem.memory import PAGE_SHIFT, PAGE_SIZE
from guestmem.uapi.kvm import (
    KVM_HC_MAP_GPA_RANGE,
    KVM_MAP_GPA_RANGE_ENCRYPTED,
    KVM_SYSTEM_EVENT_TDX_FATAL,
    MAX_PHYSICAL_ADDRESS_BITS,
)

if TYPE_CHECKING:
    from guestmem.kvm.vcpu import Vcpu

VP_VMCALL, MEM_PAGE_ACCEPT = 0, 6
GET_TD_VM_CALL_INFO, MAP_GPA, REPORT_FATAL_ERROR = 0x10000, 0x10001, 0x10003
SUCCESS, INVALID_OPERAND, ALIGN_ERROR, SUBFUNC_UNSUPPORTED = 0, 1 << 63, 1 << 63 | 2, 1 << 63 | 3
SHARED_BIT = 1 << platform.SHARED_BIT.position
_MAX_LENGTH = 2 << 20  # of one exit to userspace
_ACCEPT_GPA = (1 << 52) - PAGE_SIZE
_NO_SUCH_LEAF = Status.OPERAND_INVALID << 32 | max(Operand.NONE, 0)


class Tdcalls:
    """A vCPU's. `next` to `end` is what MapGPA has still to forward, in bytes."""

    handles: ClassVar[type] = Tdcall

    def __init__(self, vcpu: Vcpu) -> None:
        self.next = 0
        self.end = 0
        self.shared = False
        self._vcpu = vcpu

    async def handle(self, stop: Tdcall) -> Exit | None:
        regs = self._vcpu.engine.get_regs()
        if stop.leaf == MEM_PAGE_ACCEPT:
            return await self._accept(regs.rcx)
        if stop.leaf != VP_VMCALL:
            self._vcpu.engine.complete(_NO_SUCH_LEAF)
            return None
        call = None if regs.r10 else _VMCALLS.get(regs.r11)
        return self._answer(SUBFUNC_UNSUPPORTED) if call is None else call(self, regs)

    def _get_info(self, regs: Regs) -> Exit | None:
        return self._answer(INVALID_OPERAND if regs.r12 else SUCCESS, 0, r12=0, r13=0, r14=0)

    def _fatal_error(self, regs: Regs) -> Exit | None:
        data = (regs.rax, regs.rcx, regs.rdx, regs.rbx, 0, 0, regs.rsi, regs.rdi, regs.r8, regs.r9)
        rest = (regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15)
        return SystemEventExit(KVM_SYSTEM_EVENT_TDX_FATAL, data + rest)

    async def complete(self, ret: int) -> Exit | None:
        """Userspace has answered KVM_EXIT_HYPERCALL for one part of MapGPA."""
        if ret:
            return self._answer(INVALID_OPERAND, self.next)
        self.next += _MAX_LENGTH
        return self._forward() if self.next < self.end else self._answer(SUCCESS)

    async def _accept(self, operand: int) -> Exit | None:
        """A page that is not mapped is an EPT violation, and the guest repeats its TDCALL."""
        accept = Accept(operand & _ACCEPT_GPA, bool(operand & 7))
        return await guest_instructions.execute(self._vcpu, accept, self._vcpu.engine.complete)

    def _map_gpa(self, regs: Regs) -> Exit | None:
        kvm, gpa, size = self._vcpu.kvm, regs.r12, regs.r13
        limit = 1 << MAX_PHYSICAL_ADDRESS_BITS
        if not kvm.enabled_hypercalls >> KVM_HC_MAP_GPA_RANGE & 1:
            return self._answer(SUBFUNC_UNSUPPORTED, gpa)
        if not gpa < gpa + size <= limit or (gpa ^ gpa + size - 1) & SHARED_BIT:
            return self._answer(INVALID_OPERAND, gpa)
        if (gpa | size) % PAGE_SIZE:
            return self._answer(ALIGN_ERROR, gpa)
        self.shared = bool(gpa & SHARED_BIT)
        self.next, self.end = gpa, gpa + size
        return self._forward()

    def _forward(self) -> HypercallExit:
        size = min(self.end - self.next, _MAX_LENGTH)
        attributes = 0 if self.shared else KVM_MAP_GPA_RANGE_ENCRYPTED
        return HypercallExit(KVM_HC_MAP_GPA_RANGE, (self.next & ~SHARED_BIT, size >> PAGE_SHIFT, attributes))

    def _answer(self, status: int, r11: int | None = None, **registers: int) -> Exit | None:
        """The module's status is success: the call was made. What KVM says is in R10 and on. The guest goes on."""
        engine = self._vcpu.engine
        more = registers if r11 is None else {"r11": r11, **registers}
        engine.set_regs(dataclasses.replace(engine.get_regs(), r10=status, **more))
        engine.complete(SUCCESS)
        return None


_VMCALLS: dict[int, Callable[[Tdcalls, Regs], Exit | None]] = {
    GET_TD_VM_CALL_INFO: Tdcalls._get_info,
    MAP_GPA: Tdcalls._map_gpa,
    REPORT_FATAL_ERROR: Tdcalls._fatal_error,
}
