"""vCPUs as hardware and firmware know them: into guest mode and out of it, and what their pages are meanwhile."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from guestmem.arch import FirmwareError, GuestArchitecture, Platform
from guestmem.arch.cca import CcaPlatform
from guestmem.arch.pkvm import PkvmPlatform
from guestmem.arch.snp import SnpPlatform
from guestmem.arch.snp.rmp import FIRST_OWN, State, Status
from guestmem.arch.tdx import TdxPlatform
from guestmem.arch.tdx.vcpus import TdxVcpus
from tests.arch.memory import Pages

REGISTERS = bytes(144)
GFN = 0x80
New = Callable[[], Platform]


def _snp() -> SnpPlatform:
    return SnpPlatform(1 << 20)


ALL = pytest.mark.parametrize("new", [_snp, TdxPlatform, CcaPlatform, PkvmPlatform])
FIXED = pytest.mark.parametrize("new", [TdxPlatform, CcaPlatform])


def _launched(platform: Platform, vcpus: int = 2) -> GuestArchitecture:
    guest = platform.new_guest(1, 101)
    guest.start()
    guest.finalize(dict.fromkeys(range(vcpus), REGISTERS))
    return guest


@ALL
def test_into_the_guest_and_out_of_it(new: New) -> None:
    guest = _launched(new())
    guest.enter(0)
    guest.enter(1)
    assert guest.inside == {0, 1}
    guest.leave(0)
    guest.leave(0)  # it is outside
    assert guest.inside == {1}
    guest.leave(1)
    assert guest.teardown()


@FIXED
def test_a_vcpu_that_was_not_there_at_the_end_of_the_launch(new: New) -> None:
    guest = _launched(new())
    with pytest.raises(FirmwareError) as error:
        guest.enter(2)
    assert error.value.facts["no_vcpu"]
    assert not guest.inside


def test_vmrun_wants_a_vmsa() -> None:
    guest = _launched(_snp())
    with pytest.raises(FirmwareError, match="VMRUN returned VMEXIT_INVALID"):
        guest.enter(2)


def test_a_vmsa_is_in_use_while_its_vcpu_is_inside() -> None:
    platform = _snp()
    guest = _launched(platform)
    pfn = next(pfn for pfn, entry in platform.rmp.entries() if entry.vmsa)
    assert pfn >= FIRST_OWN
    guest.enter(0)
    assert platform.rmp.rmpupdate(pfn, State()) is Status.FAIL_INUSE
    guest.leave(0)
    assert platform.own_pages.count == 2
    assert guest.teardown()
    assert platform.own_pages.count == 0
    assert not list(platform.rmp.entries())


def test_vmsa_pages_are_no_ones_memory() -> None:
    """Nobody else's books have them: neither the pool's nor those of whose each page is."""
    platform = _snp()
    _launched(platform)
    assert not list(platform.owned())


@pytest.mark.parametrize("call", ["RMPUPDATE", "LAUNCH_UPDATE", "LAUNCH_FINISH"])
def test_a_launch_that_fails_leaves_no_vmsa(call: str) -> None:
    failing = [""]
    platform = SnpPlatform(1 << 20, fails=lambda name: name == f"snp: {failing[0]}")
    guest = platform.new_guest(1, 101)
    guest.start()
    failing[0] = call
    with pytest.raises(FirmwareError):
        guest.finalize({0: REGISTERS})
    failing[0] = ""
    assert platform.own_pages.count == 0
    assert not list(platform.rmp.entries())
    undisturbed = _snp().new_guest(1, 101)
    undisturbed.start()
    assert guest.finalize({0: REGISTERS}) == undisturbed.finalize({0: REGISTERS})


def test_who_is_inside_leaves_at_track() -> None:
    """A page leaves a TD though a vCPU is inside that may hold its translation: it is thrown out first."""
    platform, pages = TdxPlatform(), Pages(1)
    guest = _launched(platform)
    guest.make_private(GFN, pages.block())
    guest.enter(0)
    guest.invalidate(GFN, 1)
    assert not guest.inside
    assert platform.owner(pages.block().pfn) is None
    guest.enter(0)


def test_without_that_the_module_keeps_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    platform, pages = TdxPlatform(), Pages(1)
    guest = _launched(platform)
    guest.make_private(GFN, pages.block())
    guest.enter(0)
    monkeypatch.setattr(TdxVcpus, "leave", lambda self, tdr, vcpu: None)
    with pytest.raises(FirmwareError, match="TDX_TLB_TRACKING_NOT_DONE"):
        guest.invalidate(GFN, 1)


def test_a_vmsa_that_does_not_come_back_keeps_the_asid() -> None:
    failing = [False]
    platform = SnpPlatform(1 << 20, fails=lambda name: failing[0] and name == "snp: RMPUPDATE")
    guest = _launched(platform, 1)
    failing[0] = True
    assert not guest.teardown()
    assert [owner[:2] for _, owner in platform.vmsas()] == [(1, 101)]
