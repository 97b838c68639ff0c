"""The table: which VMM, in which configuration."""

from __future__ import annotations

from itertools import product
from typing import TypeAlias

from tests.vmms.others import Firecracker, Hyperlight, KvmIoctls, Kvmtool, Libkrun
from tests.vmms.parts import QEMU_SUITES
from tests.vmms.qemu import Qemu

Row: TypeAlias = Qemu | Kvmtool | Firecracker | Libkrun | Hyperlight | KvmIoctls

_IRQCHIPS, _CPUS = ("off", "split", "on"), (1, 4)

ROWS: tuple[Row, ...] = (
    *(Qemu(*row) for row in product(QEMU_SUITES, ("pc", "q35", "microvm"), _IRQCHIPS, _CPUS)),
    *(Qemu(*row, firmware="OVMF") for row in product(QEMU_SUITES, ("pc", "q35"), _IRQCHIPS, _CPUS)),
    Qemu("7.2", "pc", "off", options=("-sandbox", "on")),
    Qemu("11.1", "q35", "on", options=("-sandbox", "on")),
    *(Kvmtool(cpus) for cpus in _CPUS),
    *(Firecracker(cpus, seccomp) for cpus, seccomp in product(_CPUS, (True, False))),
    *(Libkrun(cpus) for cpus in _CPUS),
    Hyperlight("js"),
    Hyperlight("wasm"),
    KvmIoctls(),
)

QUICK: tuple[Row, ...] = (
    Qemu("7.2", "pc", "off"),
    Qemu("10.0", "q35", "on"),
    Qemu("11.1", "microvm", "on", 4),
    Qemu("11.1", "q35", "split", firmware="OVMF"),
    Kvmtool(1),
    Firecracker(1),
    Libkrun(1),
    Hyperlight("js"),
    KvmIoctls(),
)
"""Each VMM, machine, kind of interrupt controller and firmware at least once: what CI has the time for."""
