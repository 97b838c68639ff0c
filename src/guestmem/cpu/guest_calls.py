"""What a guest asks of its hypervisor, its firmware or the CPU by an instruction that Unicorn does not know.

    VMCALL, VMMCALL                 any guest
    VMGEXIT, PVALIDATE, RMPADJUST   an SNP guest; to another, VMGEXIT is VMMCALL and the other two are no instructions
    TDCALL                          a TD

All are 0F 01 and a third byte, told apart by 66, F2 or F3 in front, the last two of which win. To Unicorn they are
invalid, so they are looked at where they stand.

Source: AMD APM vol. 3, PVALIDATE, RMPADJUST, VMGEXIT, VMMCALL (return codes set OF, ZF, AF, PF and SF: as TEST would,
which the manual leaves open); Intel SDM vol. 2, VMCALL, TDCALL; binutils gas/testsuite/gas/i386/x86-64-snp.d and
x86-64-tdx.d for encodings. Conditions that other places tell are named there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from guestmem.cpu.cpu_state import HF_CPL, HF_CS64, HF_INHIBIT_IRQ
from guestmem.cpu.engine import Hypercall, Pvalidate, Rmpadjust, Tdcall, Vmgexit
from guestmem.cpu.exceptions import GP, PF, RFLAGS_RF, UD
from guestmem.cpu.guest_memory import PAGE, GuestFault, Stage2Refused
from guestmem.cpu.guest_walk import PF_PRESENT, PF_RESERVED, Access
from guestmem.cpu.msrs import GHCB, Msrs
from guestmem.cpu.tlb import Tlb
from guestmem.cpu.uc_core import Core
from guestmem.cpu.x86_env import GENERAL, SEGMENTS

GuestCall: TypeAlias = Hypercall | Pvalidate | Rmpadjust | Vmgexit | Tdcall
PAST_INSTRUCTION = (Hypercall, Vmgexit)
"""At these stops RIP is past the instruction; at the others it is moved by `complete`."""

_LENGTH_MAX, _ESCAPE = 15, b"\x0f\x01"
_LEGACY_PREFIXES = frozenset(b"\x26\x2e\x36\x3e\x64\x65\x66\x67\xf2\xf3")
_OPERAND_SIZE, _ADDRESS_SIZE, _REPNE, _REP = 0x66, 0x67, 0xF2, 0xF3
_RAX, _RCX, _RDX, _RBX, _RSI = (GENERAL.index(name) for name in ("rax", "rcx", "rdx", "rbx", "rsi"))
_CS = SEGMENTS.index("cs")
_CS_BIG = 1 << 22
_MASK_32, _MASK_64 = (1 << 32) - 1, (1 << 64) - 1
_CF, _PF, _AF, _ZF, _SF, _OF = 1 << 0, 1 << 2, 1 << 4, 1 << 6, 1 << 7, 1 << 11


class GuestCalls:
    """See the module. `start` is RIP of the last that was found."""

    def __init__(self, core: Core, tlb: Tlb, msrs: Msrs) -> None:
        self._core, self._tlb, self._msrs = core, tlb, msrs
        self.start = self._length = 0
        self._address_size = False  # whether it has that prefix
        # by the prefix that is part of the name, or 0, and the third byte
        self._found: dict[tuple[int, int], Callable[[], GuestCall]] = {
            (0, 0xC1): self._hypercall,
            (0, 0xD9): self._hypercall,
            (_REPNE, 0xD9): self._hypercall,
            (_REP, 0xD9): self._hypercall,
        }
        if tlb.page_bit is not None and tlb.page_bit.set_is_private:
            self._found |= {
                (_REPNE, 0xD9): self._vmgexit,
                (_REP, 0xD9): self._vmgexit,
                (_REPNE, 0xFF): self._pvalidate,
                (_REP, 0xFE): self._rmpadjust,
            }
        elif tlb.page_bit is not None:
            self._found[_OPERAND_SIZE, 0xCC] = self._tdcall

    def at_rip(self) -> GuestCall | None:
        """The one at RIP; None if there is none. Raises: GuestFault, Stage2Refused."""
        name = self._decode()
        find = self._found.get(name) if name else None
        if find is None:
            return None
        call = find()
        if isinstance(call, PAST_INSTRUCTION):
            self._move_past()
        return call

    def complete(self, call: GuestCall, value: int) -> None:
        """Put the result of `call` where the guest expects it."""
        env = self._core.cpu.env
        match call:
            case Hypercall():
                env.regs[_RAX] = value & (_MASK_64 if env.hflags & HF_CS64 else _MASK_32)
            case Vmgexit():
                self._msrs.set(GHCB, value & _MASK_64)
            case Tdcall():
                env.regs[_RAX] = value & _MASK_64
                self._move_past()
            case Pvalidate():
                self._return(value & _MASK_32)
                env.eflags = env.eflags & ~_CF | (_CF if value >> 32 & 1 else 0)
            case Rmpadjust():
                self._return(value & _MASK_32)

    def _decode(self) -> tuple[int, int] | None:
        """The prefix and the third byte of the instruction at RIP, if it begins with 0F 01."""
        env = self._core.cpu.env
        self.start = start = env.eip
        place = env.segs[_CS].base + start
        try:
            code = self._tlb.code_bytes(place, 3)  # the shortest of all
            if code[:2] != _ESCAPE:
                return self._decode_prefixed(place, bool(env.hflags & HF_CS64))
        except (GuestFault, Stage2Refused):
            return None  # Unicorn found it invalid before it had all of it
        self._length, self._address_size = 3, False
        return 0, code[2]

    def _decode_prefixed(self, place: int, long: bool) -> tuple[int, int] | None:
        repeat, sizes = 0, set()
        for length in range(_LENGTH_MAX - 2):
            byte = self._tlb.code_bytes(place + length, 1)[0]
            if byte in (_REPNE, _REP):
                repeat = byte
            elif byte in _LEGACY_PREFIXES:
                sizes.add(byte)
            elif not (long and byte >> 4 == 4):  # REX
                break
        if self._tlb.code_bytes(place + length, 2) != _ESCAPE:
            return None
        self._length, self._address_size = length + 3, _ADDRESS_SIZE in sizes
        prefix = repeat or (_OPERAND_SIZE if _OPERAND_SIZE in sizes else 0)
        return prefix, self._tlb.code_bytes(place + length + 2, 1)[0]

    def _hypercall(self) -> Hypercall:
        env = self._core.cpu.env
        hflags, regs = env.hflags, env.regs
        mask = _MASK_64 if hflags & HF_CS64 else _MASK_32
        args = regs[_RBX] & mask, regs[_RCX] & mask, regs[_RDX] & mask, regs[_RSI] & mask
        return Hypercall(regs[_RAX] & mask, args, hflags & HF_CPL)

    def _vmgexit(self) -> Vmgexit:
        ghcb = self._msrs.get(GHCB)
        assert ghcb is not None
        return Vmgexit(ghcb)

    def _tdcall(self) -> Tdcall:
        """#GP(0) outside of 64-bit code as well. Source: td_call() of the TDX module's tdx_td_dispatcher.c."""
        env = self._core.cpu.env
        if not env.hflags & HF_CS64:
            raise GuestFault(GP, 0)
        self._check_ring_0()
        return Tdcall(env.regs[_RAX])

    def _pvalidate(self) -> Pvalidate:
        self._check_ring_0()
        regs = self._core.cpu.env.regs
        return Pvalidate(self._private_page(), bool(regs[_RCX] & 1), bool(regs[_RDX] & 1))

    def _rmpadjust(self) -> Rmpadjust:
        env = self._core.cpu.env
        if not env.hflags & HF_CS64:
            raise GuestFault(UD, 0)
        self._check_ring_0()
        attributes = env.regs[_RDX]
        return Rmpadjust(
            self._private_page(),
            bool(env.regs[_RCX] & 1),
            target=attributes & 0xFF,
            permissions=attributes >> 8 & 0xFF,
            vmsa=bool(attributes >> 16 & 1),
        )

    def _check_ring_0(self) -> None:
        if self._core.cpu.env.hflags & HF_CPL:
            raise GuestFault(GP, 0)

    def _private_page(self) -> int:
        """The guest-physical address of the page at rAX, which must be mapped as private.

        Else it is a page fault with the reserved bit. Source: an SNP machine's oops at a PVALIDATE, error code 9, RAX
        in CR2, a leaf without the C-bit: TUM-DSE/CVM_eval issue 37.
        """
        linear = self._core.cpu.env.regs[_RAX] & self._address_mask() & -PAGE
        page = self._tlb.linear_memory().page(linear, Access.READ)
        if page.private is False:
            raise GuestFault(PF, PF_PRESENT | PF_RESERVED, linear)
        return page.gpa

    def _address_mask(self) -> int:
        env = self._core.cpu.env
        if env.hflags & HF_CS64:
            return _MASK_32 if self._address_size else _MASK_64
        return _MASK_32 if bool(env.segs[_CS].flags & _CS_BIG) is not self._address_size else 0xFFFF

    def _return(self, status: int) -> None:
        """EAX and the flags that follow from it; the instruction is done."""
        env = self._core.cpu.env
        env.regs[_RAX] = status
        flags = env.eflags & ~(_PF | _AF | _ZF | _SF | _OF)
        flags |= 0 if status else _ZF
        flags |= 0 if (status & 0xFF).bit_count() & 1 else _PF
        env.eflags = flags | (_SF if status >> 31 else 0)
        self._move_past()

    def _move_past(self) -> None:
        env = self._core.cpu.env
        env.eip = self.start + self._length
        if env.hflags & HF_INHIBIT_IRQ:
            env.hflags &= ~HF_INHIBIT_IRQ
        if env.eflags & RFLAGS_RF:
            env.eflags &= ~RFLAGS_RF
