"""Machine checks: what KVM logs, and what a guest gets. Values are those of Linux 6.18."""

from __future__ import annotations

from typing import Any

import pytest

from guestmem.kvm.mce import CTL_P, MAX_BANKS, MachineCheck, Report
from guestmem.trace import Refusal

VALID, OVERFLOW, UNCORRECTED, PCC = 1 << 63, 1 << 62, 1 << 61, 1 << 57
ALL = (1 << 64) - 1
MCG_CAP, MCG_STATUS, MCG_CTL, BANKS = 0x179, 0x17A, 0x17B, 0x400


def report(status: int, bank: int = 1, **fields: int) -> Report:
    return Report(**{"status": status, "address": 0x1000, "misc": 7, "mcg_status": 0, "bank": bank, **fields})


@pytest.fixture
def checks() -> MachineCheck:
    made = MachineCheck()
    made.setup(10 | CTL_P)
    return made


def status(checks: MachineCheck, bank: int = 1) -> int | None:
    return checks.get(BANKS + 4 * bank + 1, from_guest=True)


@pytest.mark.parametrize("capability", [0, MAX_BANKS + 1, 1 << 27 | 10, 1 << 10 | 1])
def test_what_cannot_be_offered_is_refused_and_changes_nothing(checks: MachineCheck, capability: int) -> None:
    with pytest.raises(Refusal, match=r"mce\.capability"):
        checks.setup(capability)
    assert checks.get(MCG_CAP, from_guest=True) == 10 | CTL_P


def test_a_fresh_vcpu_has_all_banks_and_no_control() -> None:
    fresh = MachineCheck()
    assert fresh.get(MCG_CAP, from_guest=True) == MAX_BANKS
    assert fresh.get(MCG_CTL, from_guest=True) is None
    assert fresh.get(MCG_CTL, from_guest=False) == 0
    assert fresh.get(BANKS, from_guest=True) == 0


def test_setup_switches_reporting_on(checks: MachineCheck) -> None:
    assert checks.get(MCG_CTL, from_guest=True) == ALL
    assert [checks.get(BANKS + 4 * bank, True) for bank in (0, 9, 10)] == [ALL, ALL, None]


@pytest.mark.parametrize(
    ("index", "value", "from_guest", "taken"),
    [
        (MCG_CAP, 10 | CTL_P, False, False),
        (MCG_STATUS, 5, True, True),
        (MCG_CTL, 0, True, True),
        (MCG_CTL, 1, False, False),
        (BANKS, 0, True, True),
        (BANKS, ALL ^ 1 << 10, True, True),  # Linux on K8
        (BANKS, ALL ^ 1, True, True),
        (BANKS, 1, True, False),
        (BANKS + 1, 0, True, True),
        (BANKS + 1, 1, True, False),
        (BANKS + 1, 1, False, True),
        (BANKS + 2, 1, True, True),
        (BANKS + 40, 0, False, False),
        (0x280, 0, False, True),
        (0x280, 0, True, False),  # without CMCI
        (0x280, 1, False, False),
    ],
)
def test_a_register_takes_what_kvm_takes(
    checks: MachineCheck, index: int, value: int, from_guest: bool, taken: bool
) -> None:
    before = checks.get(index, from_guest=False)
    assert checks.set(index, value, from_guest) is taken
    assert checks.get(index, from_guest=False) == (value if taken else before)


def test_a_corrected_error_is_logged_and_a_second_overflows(checks: MachineCheck) -> None:
    assert checks.report(report(VALID), cr4_mce=True) is False
    assert status(checks) == VALID
    assert checks.report(report(VALID), cr4_mce=True) is False
    assert status(checks) == VALID | OVERFLOW


def test_a_corrected_error_never_replaces_an_uncorrected(checks: MachineCheck) -> None:
    serious = report(VALID | UNCORRECTED | PCC, mcg_status=5)
    assert checks.report(serious, cr4_mce=True) is True
    assert checks.report(report(VALID)._replace(address=0x9000), cr4_mce=True) is False
    assert status(checks) == VALID | UNCORRECTED | PCC | OVERFLOW
    assert checks.get(BANKS + 6, from_guest=True) == 0x1000


@pytest.mark.parametrize(("in_progress", "cr4_mce"), [(True, True), (False, False)])
def test_a_guest_that_cannot_take_it_is_shut_down(checks: MachineCheck, in_progress: bool, cr4_mce: bool) -> None:
    checks.set(MCG_STATUS, 4 if in_progress else 0, from_guest=True)
    assert checks.report(report(VALID | UNCORRECTED | PCC, mcg_status=5), cr4_mce) is None
    assert status(checks) == 0


def test_an_uncorrected_error_that_asks_for_nothing_is_logged(checks: MachineCheck) -> None:
    assert checks.report(report(VALID | UNCORRECTED), cr4_mce=False) is False
    assert status(checks) == VALID | UNCORRECTED


@pytest.mark.parametrize("index", [MCG_CTL, BANKS + 4])
def test_nothing_is_raised_where_reporting_is_off(checks: MachineCheck, index: int) -> None:
    checks.set(index, 0, from_guest=True)
    assert checks.report(report(VALID | UNCORRECTED | PCC, mcg_status=5), cr4_mce=True) is False
    assert status(checks) == 0


@pytest.mark.parametrize(("fields", "rule"), [({"bank": 10}, "bank"), ({"status": 0}, "status")])
def test_a_bad_report_is_refused(checks: MachineCheck, fields: dict[str, Any], rule: str) -> None:
    with pytest.raises(Refusal, match=rf"mce\.{rule}"):
        checks.report(report(VALID)._replace(**fields), cr4_mce=True)
