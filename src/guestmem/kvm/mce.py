"""MachineCheck: the machine-check registers of one vCPU, and errors that the VMM reports with KVM_X86_SET_MCE.

They are KVM's own: no engine knows them. A fresh vCPU has 32 banks and no MCG_CTL; KVM_X86_SETUP_MCE says what the
guest is to see.

Source: arch/x86/kvm/x86.c kvm_vcpu_ioctl_x86_setup_mce, kvm_vcpu_ioctl_x86_set_mce, is_ucna, set_msr_mce, get_msr_mce;
Intel SDM vol. 3, chapter 17.3.
"""

from __future__ import annotations

import errno
from typing import NamedTuple

from guestmem.trace import Refusal

MAX_BANKS = 32
CTL_P, CMCI_P, SER_P = 1 << 8, 1 << 10, 1 << 24  # of MCG_CAP
SUPPORTED = CTL_P | SER_P
"""What KVM_X86_GET_MCE_CAP_SUPPORTED says, besides how many banks."""
VECTOR = 18

_MCG_CAP, _MCG_STATUS, _MCG_CTL = 0x179, 0x17A, 0x17B
_P5_ADDRESS, _P5_TYPE = 0, 1
_CTL2, _BANKS = 0x280, 0x400
_EACH = 4
_CTL, _STATUS, _ADDRESS, _MISC = range(_EACH)
_VALID, _OVERFLOW, _UNCORRECTED = 1 << 63, 1 << 62, 1 << 61
_ACTION_NEEDED = 1 << 57 | 1 << 56 | 1 << 55  # PCC, S, AR
_IN_PROGRESS = 1 << 2  # of MCG_STATUS
_COUNT, _SETTABLE = 0xFF, 0xFF | 0xFF_0000
_CTL2_BITS = 1 << 30 | 0x7FFF  # CMCI_EN, the threshold
_ALL = (1 << 64) - 1
_CTL_IGNORED = 1 << 10 | 1
"""Bits of MCi_CTL that a guest may clear though all must be set: Linux does, for errata of K8 and of P4."""

STOPS = (
    range(2),
    range(_MCG_CAP, _MCG_CTL + 1),
    range(_CTL2, _CTL2 + MAX_BANKS),
    range(_BANKS, _BANKS + _EACH * MAX_BANKS),
)
"""What the engine has to leave to us."""


class Report(NamedTuple):
    """An error of the hardware: struct kvm_x86_mce."""

    status: int
    address: int
    misc: int
    mcg_status: int
    bank: int


class MachineCheck:
    """MCG_CAP, MCG_STATUS, MCG_CTL, and four registers and a CTL2 for each bank."""

    def __init__(self) -> None:
        self.capability = MAX_BANKS
        self.status = self.control = 0
        self._registers: dict[int, int] = {}  # of banks, by MSR; those that are not 0

    @property
    def banks(self) -> int:
        return self.capability & _COUNT

    def setup(self, capability: int) -> None:
        """KVM_X86_SETUP_MCE. Raises: Refusal EINVAL `mce.capability`."""
        banks = capability & _COUNT
        if not 0 < banks <= MAX_BANKS or capability & ~(SUPPORTED | _SETTABLE):
            raise Refusal(errno.EINVAL, "mce.capability", capability=capability, supported=SUPPORTED | MAX_BANKS)
        self.capability = capability
        if capability & CTL_P:
            self.control = _ALL
        for bank in range(banks):
            self._registers[_msr(bank, _CTL)] = _ALL
            self._registers.pop(_CTL2 + bank, None)

    def report(self, error: Report, cr4_mce: bool) -> bool | None:
        """KVM_X86_SET_MCE. Whether the guest is to get #MC; None if it cannot take one now, which is a triple fault.

        Raises: Refusal EINVAL `mce.bank`, `mce.status`.
        """
        if error.bank >= self.banks:
            raise Refusal(errno.EINVAL, "mce.bank", bank=error.bank, banks=self.banks)
        if not error.status & _VALID:
            raise Refusal(errno.EINVAL, "mce.status", status=error.status)
        former = self._registers.get(_msr(error.bank, _STATUS), 0)
        if not error.status & _UNCORRECTED:
            self._log_corrected(error, former)
            return False
        if not error.mcg_status and not error.status & _ACTION_NEEDED:
            self._log(error, error.status)  # UCNA: not for the CPU to act on
            self.status = error.mcg_status
            return False
        if (self.capability & CTL_P and self.control != _ALL) or self._registers.get(_msr(error.bank, _CTL)) != _ALL:
            return False  # reporting is off
        if self.status & _IN_PROGRESS or not cr4_mce:
            return None
        self._log(error, error.status | (_OVERFLOW if former & _VALID else 0))
        self.status = error.mcg_status
        return True

    def _log_corrected(self, error: Report, former: int) -> None:
        """It never replaces an uncorrected one."""
        overflow = _OVERFLOW if former & _VALID else 0
        if former & _VALID and former & _UNCORRECTED:
            self._registers[_msr(error.bank, _STATUS)] = former | overflow
        else:
            self._log(error, error.status | overflow)

    def _log(self, error: Report, status: int) -> None:
        for register, value in ((_STATUS, status), (_ADDRESS, error.address), (_MISC, error.misc)):
            self._registers[_msr(error.bank, register)] = value

    # The registers

    @staticmethod
    def has(index: int) -> bool:
        """Whether the MSR is one of these, if only one that a vCPU may lack."""
        return any(index in stops for stops in STOPS)

    def get(self, index: int, from_guest: bool) -> int | None:
        """The value; None if there is no such register."""
        if index in (_P5_ADDRESS, _P5_TYPE):
            return 0
        if index == _MCG_CAP:
            return self.capability
        if index == _MCG_STATUS:
            return self.status
        if index == _MCG_CTL:
            return self.control if self.capability & CTL_P or not from_guest else None
        if index - _CTL2 in range(self.banks) and from_guest and not self.capability & CMCI_P:
            return None
        return self._registers.get(index, 0) if self._has_bank_of(index) else None

    def set(self, index: int, value: int, from_guest: bool) -> bool:
        """Whether it took the value."""
        if index == _MCG_STATUS:
            self.status = value
            return True
        if index == _MCG_CTL:
            return self._set_control(value, from_guest)
        if not self._has_bank_of(index):
            return False
        if index < _BANKS:
            takes = not value & ~_CTL2_BITS and (bool(self.capability & CMCI_P) or not (value or from_guest))
        elif (index - _BANKS) % _EACH == _CTL:
            takes = not value or value | _CTL_IGNORED == _ALL
        else:
            takes = not (value and from_guest and (index - _BANKS) % _EACH == _STATUS)
        if takes:
            self._registers[index] = value
        return takes

    def _has_bank_of(self, index: int) -> bool:
        return index - _CTL2 in range(self.banks) or index - _BANKS in range(_EACH * self.banks)

    def _set_control(self, value: int, from_guest: bool) -> bool:
        if not self.capability & CTL_P and (value or from_guest):
            return False
        if value not in (0, _ALL):
            return False
        self.control = value
        return True


def _msr(bank: int, register: int) -> int:
    return _BANKS + _EACH * bank + register
