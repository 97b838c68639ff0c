"""VMGEXIT with a GHCB: the page that an SNP guest shares with KVM to say why it exits, and to be answered in.

    the guest fills in an exit code, two values and registers, each with a valid bit -> VMGEXIT -> KVM reads it, clears
    the bits, does it -> SW_EXITINFO1 says how that went, SW_EXITINFO2 more -> the guest goes on

Done here: page state changes (forwarded to userspace, range by range), AP creation, hypercalls, HLT, CPUID, hypervisor
features, termination. Other events that a kernel knows (I/O, MSRs, MMIO, attestation) are answered as unknown ones are.

Source: arch/x86/kvm/svm/sev.c sev_handle_vmgexit, sev_es_validate_vmgexit, snp_begin_psc, svm_vmgexit_set_return_code;
"SEV-ES Guest-Hypervisor Communication Block Standardization", version 2.
"""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, ClassVar

from guestmem.cpu.engine import Vmgexit
from guestmem.kvm.exits import Exit, HltExit, HypercallExit, InternalErrorExit, SystemEventExit
from guestmem.kvm.protected import ghcb_msr, snp_ap
from guestmem.kvm.protected.guest_page import read_guest, write_guest
from guestmem.kvm.protected.page_state import PageStateChange
from guestmem.memory import PAGE_SIZE
from guestmem.uapi.kvm import (
    KVM_EINVAL,
    KVM_ENOSYS,
    KVM_EPERM,
    KVM_HC_MAP_GPA_RANGE,
    KVM_SYSTEM_EVENT_SEV_TERM,
)

if TYPE_CHECKING:
    from guestmem.kvm.vcpu import Vcpu

_U64 = struct.Struct("<Q")
_PLACES = {"rax": 0x1F8, "rcx": 0x308, "rdx": 0x310, "rbx": 0x318, "rsi": 0x330}
_PLACES |= {"exit_code": 0x390, "exit_info_1": 0x398, "exit_info_2": 0x3A0, "scratch": 0x3A8}
_CPL, _VALID, _VALID_BYTES = 0xCB, 0x3F0, 16
_SHARED_BUFFER, _SHARED_BUFFER_END, _USAGE = 0x800, 0xFF0, 0xFFC

EXIT_CPUID, EXIT_HLT, EXIT_VMMCALL = 0x72, 0x78, 0x81
PAGE_STATE_CHANGE, AP_CREATION = 0x80000010, 0x80000013
HV_FEATURES, TERM_REQUEST = 0x8000FFFD, 0x8000FFFE

MALFORMED_INPUT = 2
NOT_REGISTERED, INVALID_USAGE, INVALID_SCRATCH_AREA, MISSING_INPUT, INVALID_INPUT, INVALID_EVENT = range(1, 7)
_NEEDS = {
    EXIT_CPUID: ("rax", "rcx"),
    EXIT_HLT: (),
    EXIT_VMMCALL: ("rax", "cpl"),
    PAGE_STATE_CHANGE: ("scratch",),
    AP_CREATION: (),
    HV_FEATURES: (),
    TERM_REQUEST: (),
}


class Request:
    """What the guest filled in. `valid` are the names of the fields that it said to have filled in."""

    def __init__(self, page: bytes) -> None:
        bitmap = int.from_bytes(page[_VALID : _VALID + _VALID_BYTES], "little")
        self.values = {name: _U64.unpack_from(page, place)[0] for name, place in _PLACES.items()}
        self.values["cpl"] = page[_CPL]
        places = {**_PLACES, "cpl": _CPL}
        self.valid = {name for name, place in places.items() if bitmap >> place // 8 & 1}
        self.usage = int.from_bytes(page[_USAGE : _USAGE + 4], "little")

    def get(self, name: str) -> int:
        """A field; 0 if it is not valid, as a register that the guest did not give."""
        return self.values[name] if name in self.valid else 0

    def error(self) -> int:
        """Why it is none; 0 if it is one. Source: sev_es_validate_vmgexit."""
        if self.usage:
            return INVALID_USAGE
        if not {"exit_code", "exit_info_1", "exit_info_2"} <= self.valid:
            return MISSING_INPUT
        code = self.values["exit_code"]
        if code not in _NEEDS:
            return INVALID_EVENT
        needs = set(_NEEDS[code])
        if code == AP_CREATION and self.values["exit_info_1"] & 0xFFFFFFFF != snp_ap.DESTROY:
            needs.add("rax")
        return MISSING_INPUT if needs - self.valid else 0


class Ghcb:
    """A vCPU's: where its GHCB is registered, and what waits for userspace. One for each vCPU of an SNP guest."""

    handles: ClassVar[type] = Vmgexit

    def __init__(self, vcpu: Vcpu) -> None:
        self.registered_gpa: int | None = None
        self.gpa = 0
        self.waits_for: str = ""
        self.page_state: PageStateChange | None = None
        self._vcpu = vcpu

    async def handle(self, stop: Vmgexit) -> Exit | None:
        """Source: sev_handle_vmgexit. A GHCB that cannot be mapped sends the guest back without an answer."""
        if stop.ghcb & ghcb_msr.INFO_MASK:
            return self._msr_protocol(stop.ghcb)
        self.gpa = stop.ghcb
        self._vcpu.engine.complete(stop.ghcb)
        kvm = self._vcpu.kvm
        page = await read_guest(kvm, self.gpa, PAGE_SIZE) if self.gpa else None
        if page is None:
            return None
        if self.gpa != self.registered_gpa:
            return InternalErrorExit(self._vcpu.engine.get_regs().rip, f"GHCB {self.gpa:#x} is not registered")
        request = Request(page)
        await write_guest(kvm, self.gpa + _VALID, bytes(_VALID_BYTES))
        error = request.error()
        if error:
            return await self._answer(MALFORMED_INPUT, error)
        return await self._event(request)

    async def complete(self, ret: int) -> Exit | None:
        """Userspace has answered a KVM_EXIT_HYPERCALL."""
        waited_for, self.waits_for = self.waits_for, ""
        if waited_for == "page state msr":
            self._vcpu.engine.complete(ghcb_msr.PSC_RESP_ERROR if ret else ghcb_msr.PSC_RESP)
            return None
        if waited_for == "page state":
            assert self.page_state is not None
            return await self._page_state_change(await self.page_state.complete(ret))
        return await self._answer(0, 0, rax=ret)

    def _msr_protocol(self, value: int) -> Exit | None:
        answer = ghcb_msr.answer(self._vcpu, value)
        if isinstance(answer, int):
            if value & ghcb_msr.INFO_MASK == ghcb_msr.REG_GPA_REQ:
                self.registered_gpa = value & ~ghcb_msr.INFO_MASK
            self._vcpu.engine.complete(answer)
            return None
        self.waits_for = "page state msr" if isinstance(answer, HypercallExit) else ""
        return answer

    async def _event(self, request: Request) -> Exit | None:
        return await _HANDLERS[request.values["exit_code"]](self, request)

    async def _begin_page_state_change(self, request: Request) -> Exit | None:
        buffer = self._scratch(request.values["scratch"], request.values["exit_info_2"])
        if buffer is None:
            return await self._answer(MALFORMED_INPUT, INVALID_SCRATCH_AREA)
        self.page_state = PageStateChange(self._vcpu.kvm, buffer)
        return await self._page_state_change(await self.page_state.next())

    async def _ap_creation(self, request: Request) -> Exit | None:
        info_1, info_2 = request.values["exit_info_1"], request.values["exit_info_2"]
        done = await snp_ap.creation(self._vcpu.kvm, info_1, info_2, request.get("rax"))
        return await (self._answer(0, 0) if done else self._answer(MALFORMED_INPUT, INVALID_INPUT))

    async def _hv_features(self, _: Request) -> Exit | None:
        return await self._answer(0, ghcb_msr.FEATURES)

    async def _terminate(self, _: Request) -> Exit | None:
        return SystemEventExit(KVM_SYSTEM_EVENT_SEV_TERM, (self.gpa,))

    async def _halt(self, _: Request) -> Exit | None:
        await self._answer(0, 0)
        return HltExit()

    async def _cpuid(self, request: Request) -> Exit | None:
        found = ghcb_msr.cpuid(self._vcpu, request.get("rax"), request.get("rcx"))
        return await self._answer(0, 0, **dict(zip(("rax", "rbx", "rcx", "rdx"), found, strict=True)))

    async def _hypercall(self, request: Request) -> Exit | None:
        """Source: ____kvm_emulate_hypercall."""
        kvm, number = self._vcpu.kvm, request.get("rax")
        gpa, pages, attributes = request.get("rbx"), request.get("rcx"), request.get("rdx")
        if request.get("cpl"):
            return await self._answer(0, 0, rax=-KVM_EPERM)
        if number != KVM_HC_MAP_GPA_RANGE or not kvm.enabled_hypercalls >> number & 1:
            return await self._answer(0, 0, rax=-KVM_ENOSYS)
        if gpa % PAGE_SIZE or not pages:
            return await self._answer(0, 0, rax=-KVM_EINVAL)
        self.waits_for = "hypercall"
        return HypercallExit(number, (gpa, pages, attributes))

    async def _page_state_change(self, step: HypercallExit | int) -> Exit | None:
        """Forward the next range; at the end its code goes to the guest as data, not as an error."""
        if isinstance(step, HypercallExit):
            self.waits_for = "page state"
            return step
        self.page_state = None
        return await self._answer(0, step)

    def _scratch(self, gpa: int, length: int) -> int | None:
        """The guest's address of the buffer. Inside of the GHCB it is in the shared part; elsewhere in one page.
        Source: setup_vmgexit_scratch, which takes 16 pages."""
        if not gpa or gpa % PAGE_SIZE + length > PAGE_SIZE or length < 16:
            return None
        inside = gpa - self.gpa
        if 0 <= inside < PAGE_SIZE and not _SHARED_BUFFER <= inside <= inside + length <= _SHARED_BUFFER_END:
            return None
        return gpa

    async def _answer(self, info_1: int, info_2: int, **registers: int) -> Exit | None:
        """Into the GHCB, wherever its page is by now; nowhere if it is gone. The guest goes on."""
        found = await read_guest(self._vcpu.kvm, self.gpa, PAGE_SIZE)
        if found is None:
            return None
        page = bytearray(found)
        bitmap = int.from_bytes(page[_VALID : _VALID + _VALID_BYTES], "little")
        for name, value in {"exit_info_1": info_1, "exit_info_2": info_2, **registers}.items():
            _U64.pack_into(page, _PLACES[name], value % (1 << 64))
            bitmap |= 1 << _PLACES[name] // 8
        page[_VALID : _VALID + _VALID_BYTES] = bitmap.to_bytes(_VALID_BYTES, "little")
        await write_guest(self._vcpu.kvm, self.gpa, bytes(page))
        return None


_HANDLERS: dict[int, Callable[[Ghcb, Request], Awaitable[Exit | None]]] = {
    EXIT_CPUID: Ghcb._cpuid,
    EXIT_HLT: Ghcb._halt,
    EXIT_VMMCALL: Ghcb._hypercall,
    PAGE_STATE_CHANGE: Ghcb._begin_page_state_change,
    AP_CREATION: Ghcb._ap_creation,
    HV_FEATURES: Ghcb._hv_features,
    TERM_REQUEST: Ghcb._terminate,
}
assert _HANDLERS.keys() == _NEEDS.keys()
