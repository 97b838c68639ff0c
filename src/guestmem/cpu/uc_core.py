"""One Unicorn instance: its handle, its hooks, the copy of its registers, and one pass of emulation.

A pass ends for one of three reasons. A hook asked for it: `cause` says why, and the first cause wins. A TLB fill was
refused: `refused` says why, `fault_address` for which linear address, and the instruction has not happened. Or neither,
and Unicorn's error code says all: none after HLT.

The registers live in the CPU during a pass and in `state` when somebody asked for them. `fresh`: `state` is what the
CPU has. `dirty`: `state` is newer, the next pass stores it first. `eip` of `state` may be newer at any time, because a
pass takes it as its argument.
"""

from __future__ import annotations

import ctypes
import enum
import weakref
from collections.abc import Callable
from typing import Any, TypeAlias

from unicorn import unicorn_const, x86_const

from guestmem.cpu import uc_native
from guestmem.cpu.cpu_state import CpuState
from guestmem.cpu.engine import MmioRead, PortIn, PortOut
from guestmem.cpu.guest_memory import GuestFault, Stage2Refused

HOOK_TLB_FILL = unicorn_const.UC_HOOK_TLB_FILL
HOOK_BLOCK, HOOK_CODE = unicorn_const.UC_HOOK_BLOCK, unicorn_const.UC_HOOK_CODE
HOOK_INTERRUPT, HOOK_INSTRUCTION = unicorn_const.UC_HOOK_INTR, unicorn_const.UC_HOOK_INSN
HOOK_MEMORY = unicorn_const.UC_HOOK_MEM_READ | unicorn_const.UC_HOOK_MEM_WRITE


class Signal(enum.Enum):
    """Causes that carry nothing."""

    SLICE_OVER = enum.auto()
    STEPPED = enum.auto()
    SYSCALL = enum.auto()
    SYSENTER = enum.auto()
    UNKNOWN_PORT_SITE = enum.auto()
    PORT_NOT_PERMITTED = enum.auto()
    MMIO_CROSSED = enum.auto()


class Refill(enum.Enum):
    """Refusals of a TLB fill that the engine cures by itself before it runs again."""

    WINDOW_NOT_MAPPED = enum.auto()
    CODE_CHANGED = enum.auto()


Cause: TypeAlias = Signal | int | PortIn | PortOut | MmioRead
"""An int is the vector of an exception."""
Refusal: TypeAlias = Stage2Refused | GuestFault | Refill


class Core:
    """See the module. Hooks are methods of its users: `guard` wraps them, `hook` keeps them alive."""

    def __init__(self) -> None:
        self.handle = uc_native.open_handle()
        self.state = CpuState(self.handle)
        self.hook_state = CpuState(self.handle)
        self._fault_address = ctypes.c_uint64.from_address(self.handle + uc_native.fault_address_offset())
        self.fault_address = 0
        self._callbacks: list[Any] = []
        self.fresh, self.dirty = False, False
        self.cause: Cause | None = None
        self.refused: Refusal | None = None
        self.sealed = False
        self._raised: BaseException | None = None
        self._finalizer = weakref.finalize(self, _release, self.handle, (self.state, self.hook_state))
        self._finalizer.atexit = False
        self.write_register(x86_const.UC_X86_REG_FPCW, 0x37F)
        self.write_register(x86_const.UC_X86_REG_MXCSR, 0x1F80)

    def close(self) -> None:
        """Give the instance back. Idempotent."""
        self._finalizer()
        self._callbacks.clear()

    def hook(self, kind: int, callback: Any, begin: int = 1, end: int = 0, instruction: int = 0) -> int:
        """Add a hook and keep `callback` until the end."""
        self._callbacks.append(callback)
        return uc_native.hook_add(self.handle, kind, callback, begin, end, instruction)

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

    def emulate(self, sealed: bool = False) -> int:
        """One pass. Unicorn's error code. `sealed`: no fetch succeeds, nothing happens. Raises: what a hook raised."""
        state = self.state
        self.sealed = sealed
        if self.dirty:
            self._keep_breakpoints()
            state.store()
        elif not self.fresh:
            state.load()
        self.fresh = self.dirty = False
        self.cause = self.refused = None
        code = uc_native.emu_start(self.handle, state.env.eip, 0, 0, 0)
        self.fault_address = self._fault_address.value
        if self._raised is not None:
            error, self._raised = self._raised, None
            raise error
        return int(code)

    def _keep_breakpoints(self) -> None:
        """DR7 has objects behind it, to which the state points: those of the CPU live, those of the copy may not."""
        self.hook_state.load()
        self.state.tail.breakpoints = self.hook_state.tail.breakpoints

    def stop(self, cause: Cause) -> None:
        """For hooks: end the pass because of `cause`."""
        if self.cause is None:
            self.cause = cause
        uc_native.emu_stop(self.handle)

    def sync(self) -> CpuState:
        """`state`, as it is now."""
        if not self.fresh:
            self.state.load()
            self.fresh = True
        return self.state

    def modify(self) -> CpuState:
        """`state`, to be changed by the caller."""
        state = self.sync()
        self.dirty = True
        return state

    def roll_back(self) -> None:
        """`state` as it was loaded last is the truth, whatever the CPU did since."""
        self.fresh = self.dirty = True

    def seal(self) -> None:
        """For hooks: no memory access of this pass happens any more."""
        self.sealed = True
        uc_native.flush_tlb(self.handle)

    def read_register(self, register: int) -> int:
        """A register of the CPU itself, by Unicorn's number. Right inside of a hook."""
        word = ctypes.c_uint64()
        uc_native.check(uc_native.reg_read(self.handle, register, ctypes.byref(word)), f"read register {register}")
        return word.value

    def write_register(self, register: int, value: int) -> None:
        """Set a register of the CPU itself, by Unicorn's number. Right inside of a hook."""
        word = ctypes.c_uint64(value)
        uc_native.check(uc_native.reg_write(self.handle, register, ctypes.byref(word)), f"write register {register}")


def _release(handle: int, states: tuple[CpuState, ...]) -> None:
    for state in states:
        state.free()
    uc_native.close(handle)
