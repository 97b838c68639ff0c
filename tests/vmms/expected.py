"""Rows that are known to fail, in one place, each with why. One that passes is reported: then its line goes."""

from __future__ import annotations

from fnmatch import fnmatch

EXPECTED_FAILURES: tuple[tuple[str, str], ...] = (
    ("QEMU * irqchip=on *", "interrupt controllers in the kernel are being built"),
    ("QEMU * irqchip=split *", "the local APIC in the kernel is being built"),
    ("kvmtool *", "interrupt controllers in the kernel are being built"),
    ("Firecracker *", "interrupt controllers in the kernel are being built"),
    ("libkrun *", "interrupt controllers in the kernel are being built"),
)
"""A pattern of labels, and the reason. The first that matches counts."""


def why_it_may_fail(label: str) -> str:
    """The reason why a row is known to fail; "" if it is not."""
    return next((reason for pattern, reason in EXPECTED_FAILURES if fnmatch(label, pattern)), "")
