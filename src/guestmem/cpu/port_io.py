"""IN, OUT, INS and OUTS: exits that are exact.

Unicorn calls a hook from the middle of a translation block, and a stop asked for there takes effect at the next load,
store or block: up to then further instructions run. What makes it take effect at once is a code hook on the instruction
that follows, because a stop is looked for in front of each such instruction. So each port instruction is learned when
it is first met: that pass is sealed against memory, rolled back, the hook is added and the instruction runs again.

OUT and OUTS are complete when their exit is seen; a REP executes one element per exit. IN and INS are rolled back, so
that the registers at the exit are those before the instruction, and run again with the value. (INS writes zeros to its
destination before it asks the port, as QEMU has it.)
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from typing import NamedTuple

from unicorn import x86_const

from guestmem.cpu import uc_native
from guestmem.cpu.cpu_state import HF_CPL, HF_CS64
from guestmem.cpu.engine import PortIn, PortOut
from guestmem.cpu.guest_memory import GuestFault, LinearMemory
from guestmem.cpu.guest_walk import CR0_PE
from guestmem.cpu.registers import Sregs
from guestmem.cpu.tlb import Tlb
from guestmem.cpu.uc_core import HOOK_CODE, HOOK_INSTRUCTION, Core, Signal
from guestmem.cpu.x86_env import SEGMENTS, Env, SegmentCache

_SITES_MAX = 256
_INSTRUCTION_MAX = 15
_PREFIXES = frozenset(b"\x66\x67\xf2\xf3\x2e\x36\x3e\x26\x64\x65\xf0")
_IMMEDIATE, _REGISTER, _STRING = b"\xe4\xe5\xe6\xe7", b"\xec\xed\xee\xef", b"\x6c\x6d\x6e\x6f"
_CS_BASE = Env.segs.offset + SEGMENTS.index("cs") * ctypes.sizeof(SegmentCache) + SegmentCache.base.offset
_PLACE = struct.Struct(f"<QQ{Env.hflags.offset - Env.cc_dst.offset}xI{_CS_BASE - Env.hflags2.offset}xQ")
"""EIP, RFLAGS without arithmetic flags, hflags, base of CS."""


class _Site(NamedTuple):
    """A port instruction that was learned. `hook` stands on the instruction after it."""

    code: bytes
    string: bool
    hook: int


class PortIo:
    """The hooks, and the port instructions that were learned, by linear address."""

    def __init__(self, core: Core, tlb: Tlb) -> None:
        self._core, self._tlb = core, tlb
        self._sites: dict[int, _Site] = {}
        self._unknown = 0
        self._view = core.state.bytes
        self.stepping = False
        self.supply: int | None = None
        self.permitted = False
        self.asked = (0, 0)
        out, inp = uc_native.OutHook(core.guard(self._out)), uc_native.InHook(core.guard(self._in, 0))
        core.hook(HOOK_INSTRUCTION, out, instruction=x86_const.UC_X86_INS_OUT)
        core.hook(HOOK_INSTRUCTION, inp, instruction=x86_const.UC_X86_INS_IN)

    def _out(self, _uc: int, port: int, size: int, value: int, _data: int) -> None:
        core = self._core
        if core.cause is not None:
            return
        core.state.load()
        site = self._enter(port, size)
        if site is None:
            return
        if not (site.string or self.stepping):
            core.state.env.eip += len(site.code)
            core.fresh = True
        core.stop(PortOut(port, size, value))

    def _in(self, _uc: int, port: int, size: int, _data: int) -> int:
        core = self._core
        if core.cause is not None:
            return 0
        if self.supply is not None:
            value, self.supply = self.supply, None
            return value & (1 << size * 8) - 1
        core.state.load()
        if self._enter(port, size) is not None:
            core.roll_back()
            core.stop(PortIn(port, size))
        return 0

    def _enter(self, port: int, size: int) -> _Site | None:
        """The site of the instruction; None if the pass ends for another reason, rolled back to the instruction."""
        core = self._core
        eip, eflags, hflags, cs_base = _PLACE.unpack_from(self._view, Env.eip.offset)
        if hflags & HF_CPL > eflags >> 12 & 3 and not self.permitted:
            self.asked = (port, size)
            core.roll_back()
            core.stop(Signal.PORT_NOT_PERMITTED)
            return None
        self.permitted = False
        place = cs_base + eip
        site = self._sites.get(place)
        if site is not None and self._tlb.code_bytes(place, len(site.code)) == site.code:
            return site
        self._unknown = place
        core.roll_back()
        core.seal()
        core.stop(Signal.UNKNOWN_PORT_SITE)
        return None

    def learn(self) -> bool:
        """Learn the instruction that ended the last pass. False if it is none that can be decoded."""
        core, place = self._core, self._unknown
        decoded = decode(self._tlb.code_bytes, place, code64=bool(core.state.env.hflags & HF_CS64))
        if decoded is None:
            return False
        code, string = decoded
        known = self._sites
        for old in [place] if place in known else list(known) if len(known) >= _SITES_MAX else []:
            uc_native.hook_del(core.handle, known.pop(old).hook)
        after = place + len(code)
        hook = uc_native.hook_add(core.handle, HOOK_CODE, uc_native.NOTHING, after, after)
        known[place] = _Site(code, string, hook)
        self._tlb.flush_code()
        return True


def decode(fetch: Callable[[int, int], bytes], place: int, code64: bool) -> tuple[bytes, bool] | None:
    """The bytes of the port instruction at `place`, and whether it is INS or OUTS. Raises: what `fetch` raises."""
    code = b""
    while len(code) < _INSTRUCTION_MAX:
        byte = fetch(place + len(code), 1)
        code += byte
        if byte in _IMMEDIATE:
            return code + fetch(place + len(code), 1), False
        if byte in _REGISTER or byte in _STRING:
            return code, byte in _STRING
        if byte[0] not in _PREFIXES and not (code64 and byte[0] & 0xF0 == 0x40):
            return None
    return None


def io_permitted(sregs: Sregs, memory: LinearMemory, port: int, size: int) -> bool:
    """Whether the I/O bitmap of the TSS lets a program use `size` ports. Raises: Stage2Refused.

    Source: Intel SDM vol. 1, 19.5.2 "I/O permission bit map".
    """
    tr = sregs.tr
    try:
        base = memory.read(tr.base + 102, 2) + (port >> 3)
        if not sregs.cr0 & CR0_PE or not tr.type & 8 or base + 1 > tr.limit:
            return False
        return not memory.read(tr.base + base, 2) >> (port & 7) & (1 << size) - 1
    except GuestFault:
        return False
