"""What a TD asks of the module, and of KVM."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from guestmem.arch.tdx import TdxPlatform
from guestmem.arch.tdx.status import Status
from guestmem.cpu.engine import Pvalidate, Vmgexit
from guestmem.cpu.scripted import Load, Store
from guestmem.kvm.exits import HltExit, HypercallExit, InternalErrorExit, MemoryFaultExit, SystemEventExit
from guestmem.kvm.protected import tdcall
from guestmem.memory import PAGE_SIZE, Access
from guestmem.uapi.kvm import KVM_HC_MAP_GPA_RANGE, KVM_SYSTEM_EVENT_TDX_FATAL, VmType
from tests.kvm.protected.guest_calls import Guest

K = PAGE_SIZE
ENCRYPTED = 1 << 4
MAP_GPA, INFO, FATAL = tdcall.MAP_GPA, tdcall.GET_TD_VM_CALL_INFO, tdcall.REPORT_FATAL_ERROR


@pytest.fixture
def guest() -> Iterator[Guest]:
    made = Guest(VmType.TDX)
    yield made
    made.bench.close()


def test_a_page_is_accepted_that_was_never_touched(guest: Guest) -> None:
    assert guest.tdcall(tdcall.MEM_PAGE_ACCEPT, rcx=K) == HltExit()
    assert guest.engine().completed == [0]
    guest.does(Store(K, 7))
    guest.tdcall(tdcall.MEM_PAGE_ACCEPT, rcx=K)
    assert guest.engine().completed == [Status.PAGE_ALREADY_ACCEPTED << 32]
    guest.does(Load(K))
    assert guest.engine().loaded == [7], "a second acceptance leaves the bytes"


def test_a_guest_that_does_not_accept_lazily(guest: Guest) -> None:
    platform = guest.bench.host.platforms[VmType.TDX]
    assert isinstance(platform, TdxPlatform)
    platform.guests_accept = False
    exit_ = guest.does(Load(K))
    assert isinstance(exit_, MemoryFaultExit)
    assert exit_.refusal.rule == "arch.guest_access"
    guest.tdcall(tdcall.MEM_PAGE_ACCEPT, rcx=K)
    assert guest.does(Load(K)) == HltExit()
    assert guest.engine().loaded == [0]


@pytest.mark.parametrize("gpa", [1 << 30, 3 * K], ids=["no memory", "shared"])
def test_acceptance_of_what_is_no_private_page(guest: Guest, gpa: int) -> None:
    exit_ = guest.tdcall(tdcall.MEM_PAGE_ACCEPT, rcx=gpa)
    assert isinstance(exit_, MemoryFaultExit)
    assert (exit_.gpa, exit_.private) == (gpa, True)
    assert not guest.engine().completed


def test_acceptance_goes_on_when_the_page_has_become_private(guest: Guest) -> None:
    """The VMM converts at the memory fault; the TDCALL is not lost."""
    assert isinstance(guest.tdcall(tdcall.MEM_PAGE_ACCEPT, rcx=3 * K), MemoryFaultExit)
    guest.gmem.convert(3 * K, K, Access.PRIVATE)
    assert guest.run() == HltExit()
    assert guest.engine().completed == [0]


def test_a_leaf_that_the_module_does_not_have(guest: Guest) -> None:
    assert guest.tdcall(99) == HltExit()
    assert guest.engine().completed == [Status.OPERAND_INVALID << 32]


@pytest.mark.parametrize(("bit", "attributes"), [(0, ENCRYPTED), (tdcall.SHARED_BIT, 0)])
def test_map_gpa_goes_to_userspace_in_parts(guest: Guest, bit: int, attributes: int) -> None:
    """Source: tdx_map_gpa, __tdx_map_gpa."""
    first = guest.tdcall(0, r11=MAP_GPA, r12=K | bit, r13=(2 << 20) + K)
    assert first == HypercallExit(KVM_HC_MAP_GPA_RANGE, (K, 512, attributes))
    assert guest.run() == HypercallExit(KVM_HC_MAP_GPA_RANGE, (K + (2 << 20), 1, attributes))
    assert guest.run() == HltExit()
    assert guest.engine().completed == [0]
    assert guest.engine().get_regs().r10 == tdcall.SUCCESS


def test_map_gpa_says_how_far_it_came(guest: Guest) -> None:
    guest.tdcall(0, r11=MAP_GPA, r12=0, r13=4 << 20)
    second = guest.run()
    assert isinstance(second, HypercallExit)
    second.ret = 1
    assert guest.run() == HltExit()
    regs = guest.engine().get_regs()
    assert (regs.r10, regs.r11) == (tdcall.INVALID_OPERAND, 2 << 20)


REFUSED = [
    ({"r11": MAP_GPA, "r12": K, "r13": 0}, tdcall.INVALID_OPERAND),
    ({"r11": MAP_GPA, "r12": 1 << 52, "r13": K}, tdcall.INVALID_OPERAND),
    ({"r11": MAP_GPA, "r12": tdcall.SHARED_BIT - K, "r13": 2 * K}, tdcall.INVALID_OPERAND),
    ({"r11": MAP_GPA, "r12": K + 1, "r13": K}, tdcall.ALIGN_ERROR),
    ({"r11": MAP_GPA, "r12": K, "r13": K + 1}, tdcall.ALIGN_ERROR),
    ({"r11": INFO, "r12": 1}, tdcall.INVALID_OPERAND),
    ({"r11": INFO, "r12": 0}, tdcall.SUCCESS),
    ({"r11": 0x10002}, tdcall.SUBFUNC_UNSUPPORTED),
    ({"r10": 1, "r11": MAP_GPA}, tdcall.SUBFUNC_UNSUPPORTED),
]


@pytest.mark.parametrize(("registers", "status"), REFUSED)
def test_answered_at_once(guest: Guest, registers: dict[str, int], status: int) -> None:
    assert guest.tdcall(0, **registers) == HltExit()
    assert guest.engine().completed == [0]
    assert guest.engine().get_regs().r10 == status


def test_map_gpa_without_the_hypercall() -> None:
    guest = Guest(VmType.TDX, hypercalls=False)
    guest.tdcall(0, r11=MAP_GPA, r12=K, r13=K)
    regs = guest.engine().get_regs()
    assert (regs.r10, regs.r11) == (tdcall.SUBFUNC_UNSUPPORTED, K)
    guest.bench.close()


def test_a_fatal_error(guest: Guest) -> None:
    exit_ = guest.tdcall(0, r11=FATAL, r12=5)
    assert isinstance(exit_, SystemEventExit)
    assert exit_.type == KVM_SYSTEM_EVENT_TDX_FATAL
    assert (len(exit_.data), exit_.data[12]) == (16, 5)


def test_snps_instructions_are_not_a_tds(guest: Guest) -> None:
    assert guest.does(Pvalidate(0, large=False, validate=True)) == HltExit()
    assert guest.engine().completed == [(6, 0)]
    assert isinstance(guest.does(Vmgexit(2)), InternalErrorExit)
