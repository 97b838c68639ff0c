"""Rows that are known to fail, in one place, each with why. One that passes is reported: then its line goes."""

from __future__ import annotations

from fnmatch import fnmatch

_TSC = "CPUID offers no kvmclock and no leaf 0x15: Linux measures the TSC by a PIT that each look takes too long at"
EXPECTED_FAILURES: tuple[tuple[str, str], ...] = (
    ("QEMU * microvm *", _TSC),
    ("kvmtool *", "its guest prints nothing; SHLX in bzImage's decompressor was suspected, and is mended"),
    ("Firecracker *", "CPUID has no cache leaves (0x80000005)"),
    ("libkrun *", "CPUID leaves; its guest prints nothing"),
    ("QEMU * 4 vCPU *", "CPUID offers no APIC, so the other processors stay unused; not run since they can be started"),
)
"""A pattern of labels, and the reason. The first that matches counts."""


def why_it_may_fail(label: str) -> str:
    """The reason why a row is known to fail; "" if it is not."""
    return next((reason for pattern, reason in EXPECTED_FAILURES if fnmatch(label, pattern)), "")
