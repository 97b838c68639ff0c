"""Each instruction that changes the RMP, and each check of an access, against the rules of the manual.

Every row names where its rule stands: a section or table of AMD64 APM volume 2, or an instruction's page in volume 3.
"""

from __future__ import annotations

from typing import Any

import pytest

from guestmem.arch.snp.rmp import ALL, READ, WRITE, Fault, Rmp, State, Status
from guestmem.memory import Pfn

SMALL = State(True, 1, 0x40)
LARGE = State(True, 1, 0x200, large=True)
FIRMWARE = State(True, 1, 0x40, immutable=True)
HYPERVISOR = State()

RMPUPDATE = [
    # (what the table has before, page, new state, status, source)
    ({}, 5, SMALL, Status.SUCCESS, "APM 3 RMPUPDATE"),
    ({}, 512, LARGE, Status.SUCCESS, "APM 3 RMPUPDATE"),
    ({5: SMALL}, 5, HYPERVISOR, Status.SUCCESS, "APM 2 15.36.5, a page is taken back"),
    ({}, 4096, SMALL, Status.FAIL_INPUT, "APM 3 RMPUPDATE, beyond what the RMP covers"),
    ({}, 513, LARGE, Status.FAIL_INPUT, "APM 3 RMPUPDATE, large and not aligned"),
    ({}, 512, LARGE._replace(gfn=0x201), Status.FAIL_INPUT, "APM 3 RMPUPDATE, large at an odd guest address"),
    ({}, 5, State(False, 1, 0x40), Status.FAIL_INPUT, "APM 3 RMPUPDATE, an unassigned page has no owner"),
    ({5: FIRMWARE}, 5, HYPERVISOR, Status.FAIL_PERMISSION, "APM 3 RMPUPDATE, immutable"),
    ({520: SMALL}, 512, LARGE, Status.FAIL_OVERLAP, "APM 2 15.36.6, a 4K entry inside"),
    ({512: LARGE}, 520, SMALL, Status.FAIL_OVERLAP, "APM 2 15.36.6, inside a 2M entry"),
]


@pytest.mark.parametrize(("before", "pfn", "new", "status", "source"), RMPUPDATE)
def test_rmpupdate(before: dict[int, State], pfn: int, new: State, status: Status, source: str) -> None:
    rmp = table(before)
    assert rmp.rmpupdate(Pfn(pfn), new) is status, source
    if status is Status.SUCCESS:
        found = rmp.lookup(Pfn(pfn))
        assert (found is None) is (not new.assigned)
        assert found is None or (found[1].permissions == (ALL, 0, 0, 0) and not found[1].validated), "15.36.7"


PSMASH = [
    ({512: LARGE}, 512, Status.SUCCESS, "APM 3 PSMASH"),
    ({512: LARGE}, 520, Status.FAIL_INPUT, "APM 3 PSMASH, not aligned"),
    ({}, 512, Status.FAIL_INPUT, "APM 3 PSMASH, no large entry"),
    ({512: State(True, 1, 0x200)}, 512, Status.FAIL_INPUT, "APM 3 PSMASH, a small entry"),
    ({}, 4096, Status.FAIL_BADADDR, "APM 3 PSMASH, not covered"),
    ({512: LARGE._replace(immutable=True)}, 512, Status.FAIL_PERMISSION, "APM 3 PSMASH, immutable"),
]


@pytest.mark.parametrize(("before", "pfn", "status", "source"), PSMASH)
def test_psmash(before: dict[int, State], pfn: int, status: Status, source: str) -> None:
    assert table(before).psmash(Pfn(pfn)) is status, source


def test_psmash_keeps_validation_and_counts_addresses_up() -> None:
    """APM 2 15.36.11: the small entries are equal to the large one but for size and address."""
    rmp = table({512: LARGE})
    assert rmp.pvalidate(1, 0x200, Pfn(512), large=True, validate=True) == (Status.SUCCESS, False)
    assert rmp.psmash(Pfn(512)) is Status.SUCCESS
    for number in (0, 1, 511):
        assert rmp.gfn_of(Pfn(512 + number)) == 0x200 + number
        found = rmp.lookup(Pfn(512 + number))
        assert found is not None
        assert found[1].validated and not found[1].large


PVALIDATE: list[tuple[dict[int, State], dict[str, Any], object, str]] = [
    ({5: SMALL}, {}, (Status.SUCCESS, False), "APM 3 PVALIDATE"),
    ({5: SMALL}, {"validate": False}, (Status.SUCCESS, True), "APM 3 PVALIDATE, carry: no change"),
    ({5: SMALL}, {"vmpl": 1}, Fault.GENERAL_PROTECTION, "APM 3 PVALIDATE, VMPL0 only"),
    ({5: SMALL}, {"asid": 2}, Fault.NPF, "APM 2 table 15-39, Guest-Owned"),
    ({5: SMALL}, {"gfn": 0x41}, Fault.NPF, "APM 2 table 15-39, Reverse-Map"),
    ({}, {}, Fault.NPF, "APM 2 table 15-39, Guest-Owned"),
    ({5: FIRMWARE}, {}, Fault.NPF, "APM 2 table 15-39, Mutable"),
    (
        {512: State(True, 1, 0x200)},
        {"pfn": 512, "gfn": 0x200, "large": True},
        (Status.FAIL_SIZEMISMATCH, False),
        "15-40",
    ),
    ({512: LARGE}, {"pfn": 513, "gfn": 0x201}, Fault.NPF_SIZE, "APM 2 table 15-40: the hypervisor smashes"),
    ({512: LARGE}, {"pfn": 513, "gfn": 0x201, "large": True}, (Status.FAIL_INPUT, False), "APM 3 PVALIDATE, unaligned"),
]


@pytest.mark.parametrize(("before", "given", "answer", "source"), PVALIDATE)
def test_pvalidate(before: dict[int, State], given: dict[str, Any], answer: object, source: str) -> None:
    call = {"asid": 1, "gfn": 0x40, "pfn": Pfn(5), "large": False, "validate": True, **given}
    assert table(before).pvalidate(**call) == answer, source


RMPADJUST: list[tuple[dict[str, Any], object, str]] = [
    ({}, Status.SUCCESS, "APM 3 RMPADJUST"),
    ({"vmsa": True, "target": 1, "permissions": 0}, Status.SUCCESS, "APM 3 RMPADJUST, VMPL0 makes a VMSA"),
    ({"target": 0}, Status.FAIL_PERMISSION, "APM 2 15.36.7, not its own level"),
    ({"vmpl": 1, "target": 1}, Status.FAIL_PERMISSION, "APM 2 15.36.7"),
    ({"vmpl": 1, "target": 2}, Status.FAIL_PERMISSION, "APM 2 15.36.7, more than VMPL1 has itself"),
    (
        {"vmpl": 1, "target": 2, "permissions": 0, "vmsa": True},
        Status.FAIL_PERMISSION,
        "APM 3 RMPADJUST, VMSA by VMPL0",
    ),
    ({"target": 4}, Status.FAIL_INPUT, "APM 3 RMPADJUST, no such level"),
    ({"permissions": 0x20}, Status.FAIL_INPUT, "APM 2 table 15-36, reserved bits"),
    ({"validated": False}, Fault.NOT_VALIDATED, "APM 3 RMPADJUST, #VC"),
    ({"asid": 2}, Fault.NPF, "APM 2 table 15-39, Guest-Owned"),
]


@pytest.mark.parametrize(("given", "answer", "source"), RMPADJUST)
def test_rmpadjust(given: dict[str, Any], answer: object, source: str) -> None:
    rmp = table({5: SMALL})
    if given.pop("validated", True):
        rmp.pvalidate(1, 0x40, Pfn(5), large=False, validate=True)
    call = {"asid": 1, "gfn": 0x40, "pfn": Pfn(5), "large": False, "target": 1, "permissions": READ, **given}
    assert rmp.rmpadjust(**call) is answer, source


def test_rmpadjust_of_2m_where_there_is_4k() -> None:
    """APM 3 RMPADJUST; verismo access_s.rs: whether it is valid is looked at first."""
    rmp = table({512: State(True, 1, 0x200)})
    call: dict[str, Any] = {"asid": 1, "gfn": 0x200, "pfn": Pfn(512), "large": True, "target": 1, "permissions": READ}
    assert rmp.rmpadjust(**call) is Fault.NOT_VALIDATED
    rmp.pvalidate(1, 0x200, Pfn(512), large=False, validate=True)
    assert rmp.rmpadjust(**call) is Status.FAIL_SIZEMISMATCH


ACCESSES: list[tuple[dict[int, State], bool, dict[str, Any], Fault | None, str]] = [
    ({5: SMALL}, True, {}, None, "15-39"),
    ({5: SMALL}, False, {}, Fault.NOT_VALIDATED, "15-39, Validated"),
    ({}, True, {}, Fault.NPF, "15-39, Guest-Owned"),
    ({5: SMALL}, True, {"asid": 2}, Fault.NPF, "15-39, Guest-Owned"),
    ({5: SMALL}, True, {"gfn": 0x41}, Fault.NPF, "15-39, Reverse-Map"),
    ({5: FIRMWARE}, False, {}, Fault.NPF, "15-39, Mutable; before Validated"),
    ({5: SMALL}, True, {"leaf_large": True}, Fault.NPF, "15-39, Page-Size; before Validated"),
    ({512: LARGE}, True, {"pfn": 513, "gfn": 0x201}, Fault.NPF, "15-39, Page-Size"),
    ({5: SMALL}, True, {"vmpl": 1}, Fault.NPF_VMPL, "15-39, VMPL"),
    ({5: SMALL}, True, {"encrypted": False}, Fault.NPF, "15-39, data write with C=0: Hypervisor-Owned"),
    ({5: SMALL}, True, {"encrypted": False, "need": READ}, None, "15-39, a read with C=0 is not checked"),
    ({}, True, {"encrypted": False}, None, "15-39, C=0 and the hypervisor's"),
]


@pytest.mark.parametrize(("before", "validated", "given", "fault", "source"), ACCESSES)
def test_guest_accesses(
    before: dict[int, State], validated: bool, given: dict[str, Any], fault: Fault | None, source: str
) -> None:
    rmp = table(before)
    if validated:
        for pfn, state in before.items():
            rmp.pvalidate(1, state.gfn, Pfn(pfn), large=state.large, validate=True)
    call = {"asid": 1, "gfn": 0x40, "pfn": Pfn(5), "leaf_large": False, "need": READ | WRITE, **given}
    assert rmp.check_guest(**call) is fault, source


def test_host_writes() -> None:
    """APM 2 table 15-39, Hypervisor-Owned: also for a 2M leaf of which one page is a guest's."""
    rmp = table({520: SMALL})
    assert rmp.check_host_write(Pfn(520)) is Fault.HOST
    assert rmp.check_host_write(Pfn(521)) is None
    assert rmp.check_host_write(Pfn(512), large=True) is Fault.HOST


def test_vmrun_wants_a_vmsa_and_holds_it() -> None:
    """APM 2 15.36.12, table 15-41: what VMRUN uses cannot be changed until #VMEXIT."""
    rmp = table({5: SMALL})
    assert rmp.vmrun(1, 0x40, Pfn(5)) is Fault.INVALID
    rmp.pvalidate(1, 0x40, Pfn(5), large=False, validate=True)
    assert rmp.rmpadjust(1, 0x40, Pfn(5), large=False, target=1, permissions=0, vmsa=True) is Status.SUCCESS
    assert rmp.vmrun(2, 0x40, Pfn(5)) is Fault.INVALID
    assert rmp.vmrun(1, 0x40, Pfn(5)) is None
    assert rmp.rmpupdate(Pfn(5), HYPERVISOR) is Status.FAIL_INUSE
    assert rmp.rmpadjust(1, 0x40, Pfn(5), large=False, target=1, permissions=0) is Status.FAIL_INUSE
    rmp.vmexit(Pfn(5))
    assert rmp.rmpupdate(Pfn(5), HYPERVISOR) is Status.SUCCESS


def table(before: dict[int, State]) -> Rmp:
    rmp = Rmp(4096)
    for pfn, state in before.items():
        assert rmp.rmpupdate(Pfn(pfn), state) is Status.SUCCESS
    return rmp
