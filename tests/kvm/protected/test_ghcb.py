"""What an SNP guest asks of KVM: with the GHCB MSR, and in a GHCB."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

from guestmem.check.protected import ghcb
from guestmem.cpu.engine import Tdcall, Vmgexit
from guestmem.cpu.scripted import Write
from guestmem.kvm.exits import HltExit, HypercallExit, InternalErrorExit, SystemEventExit
from guestmem.kvm.protected import ghcb as events
from guestmem.kvm.protected import ghcb_msr, page_state, snp_ap
from guestmem.memory import PAGE_SIZE, Access
from guestmem.uapi.kvm import KVM_HC_MAP_GPA_RANGE, KVM_SYSTEM_EVENT_SEV_TERM, VmType
from tests.kvm.protected.guest_calls import SHARED, Guest

K = PAGE_SIZE
ENCRYPTED = 1 << 4
BUFFER = SHARED + 0x800


@pytest.fixture
def guest() -> Iterator[Guest]:
    made = Guest(VmType.SNP, vcpus=2)
    yield made
    made.bench.close()


# The MSR protocol

MSR = [
    (ghcb_msr.SEV_INFO_REQ, 2 << 48 | 1 << 32 | 51 << 24 | 1),
    (ghcb_msr.HV_FT_REQ, 3 << 12 | 0x81),
    (ghcb_msr.PREF_GPA_REQ, (1 << 64) - K | 0x11),
    (SHARED | ghcb_msr.REG_GPA_REQ, SHARED | 0x13),
    (0x8000_0000 << 32 | 1 << 30 | ghcb_msr.CPUID_REQ, 0x68747541 << 32 | 1 << 30 | 5),
    (3 << 52 | K | ghcb_msr.PSC_REQ, 1 << 63 | 0x15),
    (0xABC, 0xABC),
]


@pytest.mark.parametrize(("value", "answer"), MSR)
def test_msr_protocol(guest: Guest, value: int, answer: int) -> None:
    """Source: sev_handle_vmgexit_msr_protocol."""
    guest.vcpus[0].cpuid = {(0x8000_0000, 0): (0, 0x68747541, 0, 0)}
    assert guest.does(Vmgexit(value)) == HltExit()
    assert guest.engine().completed == [answer]


@pytest.mark.parametrize(("operation", "attributes"), [(ghcb_msr.PRIVATE, ENCRYPTED), (ghcb_msr.SHARED, 0)])
@pytest.mark.parametrize(("ret", "answer"), [(0, ghcb_msr.PSC_RESP), (22, ghcb_msr.PSC_RESP_ERROR)])
def test_page_state_change_by_msr(guest: Guest, operation: int, attributes: int, ret: int, answer: int) -> None:
    exit_ = guest.does(Vmgexit(operation << 52 | 2 * K | ghcb_msr.PSC_REQ))
    assert exit_ == HypercallExit(KVM_HC_MAP_GPA_RANGE, (2 * K, 1, attributes))
    assert isinstance(exit_, HypercallExit)
    exit_.ret = ret
    assert guest.run() == HltExit()
    assert guest.engine().completed == [answer]


def test_termination_by_msr(guest: Guest) -> None:
    assert guest.does(Vmgexit(0x1234_100)) == SystemEventExit(KVM_SYSTEM_EVENT_SEV_TERM, (0x1234_100,))


def test_without_the_hypercall_a_page_state_change_is_refused() -> None:
    guest = Guest(VmType.SNP, hypercalls=False)
    assert guest.does(Vmgexit(1 << 52 | K | ghcb_msr.PSC_REQ)) == HltExit()
    assert guest.engine().completed == [ghcb_msr.PSC_RESP_ERROR]
    guest.asks(events.PAGE_STATE_CHANGE)
    assert guest.answer() == (events.MALFORMED_INPUT, events.MISSING_INPUT)
    guest.bench.close()


# The GHCB

EVENTS = [
    ({"exit_code": events.HV_FEATURES}, (0, 3)),
    ({"exit_code": 0x7B}, (2, events.INVALID_EVENT)),
    ({"exit_code": events.EXIT_VMMCALL}, (2, events.MISSING_INPUT)),
    ({"exit_code": events.PAGE_STATE_CHANGE}, (2, events.MISSING_INPUT)),
    ({"exit_code": events.AP_CREATION, "info_1": 1 << 32 | snp_ap.CREATE}, (2, events.MISSING_INPUT)),
    ({"exit_code": events.AP_CREATION, "info_1": 9 << 32, "info_2": K, "rax": 1}, (2, events.INVALID_INPUT)),
    ({"exit_code": events.AP_CREATION, "info_1": 1 << 32 | 3, "info_2": K, "rax": 1}, (2, events.INVALID_INPUT)),
    ({"exit_code": events.AP_CREATION, "info_1": 1 << 32 | 1, "info_2": K, "rax": 5}, (2, events.INVALID_INPUT)),
    ({"exit_code": events.AP_CREATION, "info_1": 1 << 32 | 1, "info_2": K + 8, "rax": 1}, (2, events.INVALID_INPUT)),
    ({"exit_code": events.AP_CREATION, "info_1": 1 << 32 | 1, "info_2": 2 << 20, "rax": 1}, (2, events.INVALID_INPUT)),
    ({"exit_code": events.AP_CREATION, "info_1": 1 << 32, "info_2": K, "rax": 1}, (0, 0)),
    ({"exit_code": events.AP_CREATION, "info_1": 1 << 32 | snp_ap.DESTROY}, (0, 0)),
]


@pytest.mark.parametrize(("request_", "answer"), EVENTS)
def test_event(guest: Guest, request_: dict[str, int], answer: tuple[int, int]) -> None:
    """Source: sev_es_validate_vmgexit, sev_handle_vmgexit, sev_snp_ap_creation."""
    assert guest.asks(**request_) == HltExit()
    assert guest.answer() == answer


def test_a_ghcb_that_is_not_registered(guest: Guest) -> None:
    write, _, vmgexit = ghcb(SHARED, events.HV_FEATURES)
    assert isinstance(guest.does(write, vmgexit), InternalErrorExit)


def test_a_ghcb_that_is_no_shared_memory(guest: Guest) -> None:
    """The guest goes on without an answer."""
    assert guest.does(Vmgexit(K | ghcb_msr.REG_GPA_REQ), Vmgexit(K), Vmgexit(1 << 30)) == HltExit()


def test_the_wrong_usage(guest: Guest) -> None:
    write, *calls = ghcb(SHARED, events.HV_FEATURES)
    guest.does(write, Write(SHARED + 0xFFC, b"\1", private=False), *calls)
    assert guest.answer() == (events.MALFORMED_INPUT, events.INVALID_USAGE)


def test_hlt_and_termination(guest: Guest) -> None:
    assert guest.asks(events.EXIT_HLT) == HltExit()
    assert guest.engine().done == 3
    assert guest.asks(events.TERM_REQUEST) == SystemEventExit(KVM_SYSTEM_EVENT_SEV_TERM, (SHARED,))


def test_cpuid(guest: Guest) -> None:
    guest.vcpus[0].cpuid = {(7, 0): (1, 2, 3, 4)}
    write, *calls = ghcb(SHARED, events.EXIT_CPUID, rax=7)
    valid = Write(SHARED + 0x3F0 + 97 // 8, bytes([1 << 97 % 8]), private=False)  # RCX
    guest.does(write, valid, *calls)
    assert guest.answer() == (0, 0)
    assert guest.rax() == 1


def test_tdcall_is_not_snps(guest: Guest) -> None:
    assert isinstance(guest.does(Tdcall(0)), InternalErrorExit)


# Page state changes


def _list(*entries: tuple[int, int, bool], current: int = 0, end: int | None = None) -> Write:
    header = struct.pack("<HHI", current, len(entries) - 1 if end is None else end, 0)
    packed = (page_state.pack(page_state.Entry(gfn, operation, large, 0)) for gfn, operation, large in entries)
    return Write(BUFFER, header + b"".join(struct.pack("<Q", value) for value in packed), private=False)


def _change(guest: Guest, buffer: Write) -> object:
    """The guest asks for the changes in `buffer`."""
    write, *calls = ghcb(SHARED, events.PAGE_STATE_CHANGE, 0, 0x700)
    scratch = Write(SHARED + 0x3A8, BUFFER.to_bytes(8, "little"), private=False)
    valid = Write(SHARED + 0x3F0 + 14, bytes([0b111100]), private=False)  # code, both values, scratch
    return guest.does(write, buffer, scratch, valid, *calls)


def test_neighbours_are_one_range(guest: Guest) -> None:
    changes = _list((1, 1, False), (2, 1, False), (0, 2, False))
    first = _change(guest, changes)
    assert first == HypercallExit(KVM_HC_MAP_GPA_RANGE, (K, 2, ENCRYPTED))
    second = guest.run()
    assert second == HypercallExit(KVM_HC_MAP_GPA_RANGE, (0, 1, 0))
    assert guest.run() == HltExit()
    assert guest.answer() == (0, 0)
    assert struct.unpack_from("<HH", bytes(guest.view[BUFFER : BUFFER + 4])) == (3, 2)


def test_userspace_refuses_the_second_range(guest: Guest) -> None:
    _change(guest, _list((1, 1, False), (3, 2, False)))
    second = guest.run()
    assert isinstance(second, HypercallExit)
    second.ret = 1
    assert guest.run() == HltExit()
    assert guest.answer() == (0, page_state.ERROR_GENERIC)
    assert struct.unpack_from("<H", bytes(guest.view[BUFFER : BUFFER + 2])) == (1,)


def test_a_large_page(guest: Guest) -> None:
    exit_ = _change(guest, _list((512, 1, True), (1024, 1, True)))
    assert exit_ == HypercallExit(KVM_HC_MAP_GPA_RANGE, (2 << 20, 1024, ENCRYPTED | 1))


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        (_list((1, 1, False), end=253), page_state.ERROR_INVALID_HDR),
        (_list((1, 1, True)), page_state.ERROR_INVALID_ENTRY),
        (_list((1, 3, False)), 0),
        (_list((1, 1, False), current=1), 0),
    ],
    ids=["too long", "2M at 4K", "smash", "none left"],
)
def test_the_end_of_a_page_state_change(guest: Guest, changes: Write, code: int) -> None:
    """Source: snp_begin_psc."""
    assert _change(guest, changes) == HltExit()
    assert guest.answer() == (0, code)


def test_the_ghcb_is_converted_while_userspace_is_busy(guest: Guest) -> None:
    """The list is gone, and the answer with it; the guest goes on."""
    _change(guest, _list((1, 1, False), (3, 2, False)))
    guest.gmem.convert(SHARED, K, Access.PRIVATE)
    assert guest.run() == HltExit()
