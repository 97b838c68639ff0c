"""One Unicorn instance: its handle, its hooks, its registers, and one pass of emulation.

A pass ends for one of four reasons. A hook asked for it: `cause` says why, and the first cause wins. A TLB fill was
refused: `refused` says why, `fault_address` for which linear address, and the instruction has not happened. An
exception or an exit of the SVM kind: `exception` is its number. Or HLT.

A slice ends, and a stop that a hook asks for is taken, at the start of a block, where it is exact. Unicorn by itself
also looks for a stop after each load and store, when RIP is still on the instruction: after a store it would happen
twice. `no_exit_request`, which exists for the IT blocks of ARM, leaves these checks out, and so makes loads and stores
faster than in bare Unicorn. A step (`stepping`) wants them, because a read must be stopped before its value is used,
and is of one instruction; no slice ends in it.

The timer's thread ends a slice as a request for INIT, which the CPU exits for, and not by uc_emu_stop(): once a stop is
asked for, Unicorn calls only the first of its instruction hooks, so a SYSCALL before the end of the block would be left
out.
"""

from __future__ import annotations

import ctypes
import enum
import weakref
from collections.abc import Callable
from typing import Any, TypeAlias

from unicorn import unicorn_const, x86_const

from guestmem.cpu import uc_native
from guestmem.cpu.cpu_state import REQUEST_INIT, Cpu
from guestmem.cpu.engine import MmioRead, PortIn, PortOut
from guestmem.cpu.guest_memory import HOST_SIZE, GuestFault, Stage2Refused
from guestmem.cpu.slice_timer import shared as slice_timer

HOOK_TLB_FILL, HOOK_INSTRUCTION = unicorn_const.UC_HOOK_TLB_FILL, unicorn_const.UC_HOOK_INSN
HOOK_MEMORY = unicorn_const.UC_HOOK_MEM_READ | unicorn_const.UC_HOOK_MEM_WRITE


class Signal(enum.Enum):
    """Causes that carry nothing."""

    SYSCALL = enum.auto()
    SYSENTER = enum.auto()
    MMIO_CROSSED = enum.auto()
    PORT_IN_DONE = enum.auto()


class CodeChanged(enum.Enum):
    """The refusal of a fetch that the engine cures by itself before it runs again."""

    CODE_CHANGED = enum.auto()


CODE_CHANGED = CodeChanged.CODE_CHANGED
Cause: TypeAlias = Signal | PortIn | PortOut | MmioRead | Stage2Refused | GuestFault
Refusal: TypeAlias = Stage2Refused | GuestFault | CodeChanged


class Core:
    """See the module. Hooks are methods of its users: `guard` wraps them, `hook` keeps them alive."""

    def __init__(self) -> None:
        self.handle = uc_native.open_handle()
        first = uc_native.Page.SIZE
        uc_native.check(uc_native.mem_map_ptr(self.handle, first, HOST_SIZE - first, 7, first), "uc_mem_map_ptr")
        self._finalizer = weakref.finalize(self, uc_native.close, self.handle)
        self._finalizer.atexit = False
        self._callbacks: list[Any] = []
        self._fault_address = ctypes.c_uint64.from_address(self.handle + uc_native.fault_address_offset())
        self.fault_address = 0
        self.cause: Cause | None = None
        self.refused: Refusal | None = None
        self.exception = -1
        self.stepping = self.slice_over = self.sealed = False
        self._raised: BaseException | None = None
        self.write_register(x86_const.UC_X86_REG_FPCW, 0x37F)
        self.write_register(x86_const.UC_X86_REG_FPTAG, 0xFFFF)
        self.write_register(x86_const.UC_X86_REG_MXCSR, 0x1F80)
        self.cpu = Cpu(self.handle)

    def close(self) -> None:
        """Give the instance back. Idempotent."""
        self._finalizer()
        self._callbacks.clear()

    def hook(self, kind: int, callback: Any, instruction: int = 0) -> int:
        """Add a hook and keep `callback` until the end."""
        self._callbacks.append(callback)
        return uc_native.hook_add(self.handle, kind, callback, instruction=instruction)

    def guard(self, function: Callable[..., Any], default: Any = None) -> Callable[..., Any]:
        """`function` for a hook: what it raises ends the pass, is raised there, and the hook answers `default`."""

        def guarded(*arguments: Any) -> Any:
            try:
                return function(*arguments)
            except BaseException as error:
                self._raised = self._raised or error
                uc_native.emu_stop(self.handle)
                return default

        return guarded

    def emulate(self) -> int:
        """One pass. Unicorn's error code. Raises: what a hook raised."""
        cpu = self.cpu
        self.cause = self.refused = None
        code = uc_native.emu_start(self.handle, cpu.env.eip, 0, 0, 0)
        if code:
            self.fault_address, self.exception = self._fault_address.value, cpu.pass_end.exception_index
        if self._raised is not None:
            error, self._raised = self._raised, None
            raise error
        return int(code)

    def step(self) -> int:
        """A pass of one instruction, if RFLAGS.TF is set. See `emulate`."""
        with slice_timer.lock:
            self.stepping = True
            self.cpu.interrupt_request.value = 0
        self.cpu.no_exit_request.value = 0
        try:
            return self.emulate()
        finally:
            self.stepping = False
            self.cpu.no_exit_request.value = 1

    def sealed_pass(self) -> None:
        """A pass in which no fetch succeeds and nothing happens: at its end Unicorn lets go of hooks that were deleted.

        Unicorn's TLB is empty after it.
        """
        uc_native.flush_tlb(self.handle)
        self.sealed = True
        try:
            self.emulate()
        finally:
            self.sealed = False

    def stop(self, cause: Cause) -> None:
        """For hooks: end the pass because of `cause`, at the start of the next block, or in a step at once."""
        if self.cause is None:
            self.cause = cause
        uc_native.emu_stop(self.handle)

    def begin_slice(self) -> None:
        """What asked the last slice to end is over."""
        if self.slice_over:
            self.slice_over = False
            self.cpu.interrupt_request.value = 0

    def end_slice(self) -> None:
        """For the timer's thread, which holds the timer's lock: no block begins any more."""
        self.slice_over = True
        if not self.stepping and self._finalizer.alive:
            self.cpu.interrupt_request.value |= REQUEST_INIT
            self.cpu.leave_blocks.value = 0xFFFF

    def read_register(self, register: int) -> int:
        """A register of the CPU itself, by Unicorn's number. Right inside of a hook."""
        word = ctypes.c_uint64()
        uc_native.check(uc_native.reg_read(self.handle, register, ctypes.byref(word)), f"read register {register}")
        return word.value

    def write_register(self, register: int, value: int) -> None:
        """Set a register of the CPU itself, by Unicorn's number. Right inside of a hook."""
        word = ctypes.c_uint64(value)
        uc_native.check(uc_native.reg_write(self.handle, register, ctypes.byref(word)), f"write register {register}")
