"""Rows that are known to fail, in one place, each with why. One that passes is reported: then its line goes."""

from __future__ import annotations

from fnmatch import fnmatch

_TSC = "no kvmclock, no leaf 0x15: Linux measures the TSC by a PIT that each look takes too long at"
EXPECTED_FAILURES: tuple[tuple[str, str], ...] = (
    ("QEMU * microvm *", _TSC),
    ("kvmtool *", "bzImage's decompressor uses SHLX, which is #UD where CR4.OSFXSR is off"),
    ("Firecracker *", "CPUID has no cache leaves (0x80000005)"),
    ("libkrun *", "CPUID leaves; its guest prints nothing"),
    ("QEMU * 4 vCPU *", "the other processors are not started yet"),
)
"""A pattern of labels, and the reason. The first that matches counts."""


def why_it_may_fail(label: str) -> str:
    """The reason why a row is known to fail; "" if it is not."""
    return next((reason for pattern, reason in EXPECTED_FAILURES if fnmatch(label, pattern)), "")
