"""QEMU: version x machine x interrupt controllers x vCPUs x firmware."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from tests.vmms.boot import Boot, workload_verdict
from tests.vmms.parts import Parts

MEMORY = "256"
_QUIET = ("-nodefaults", "-no-user-config", "-display", "none", "-monitor", "none", "-no-reboot")


@dataclass(frozen=True)
class Qemu:
    """`accel` "kvm" is what is under test, "tcg" the peer. `irqchip`: kernel-irqchip=, which TCG does not know.

    `options` are further arguments, which stand in the label as they are.
    """

    version: str
    machine: str = "pc"
    irqchip: str = "off"
    cpus: int = 1
    firmware: str = "SeaBIOS"
    options: tuple[str, ...] = ()
    accel: str = "kvm"

    @property
    def label(self) -> str:
        irqchip = f"irqchip={self.irqchip}" if self.accel == "kvm" else self.accel
        words = (f"QEMU {self.version}", self.machine, irqchip, f"{self.cpus} vCPU", self.firmware, *self.options)
        return " ".join(words)

    def peer(self) -> Qemu:
        """The same boot by QEMU's own TCG."""
        return replace(self, accel="tcg", irqchip="off", options=())

    def boot(self, parts: Parts, scratch: Path) -> Boot:
        root, image = parts.qemu_root(self.version), parts.image()
        serial = scratch / "serial"
        irqchip = f",kernel-irqchip={self.irqchip}" if self.accel == "kvm" else ""
        command = [
            str(root / "usr/bin/qemu"),
            *("-L", str(root / "usr/share/qemu"), "-L", str(root / "usr/share/seabios"), *_QUIET),
            *("-machine", f"{self.machine},accel={self.accel}{irqchip}"),
            *("-m", MEMORY, "-smp", str(self.cpus), "-serial", f"file:{serial}"),
            *(_flash(root, scratch) if self.firmware == "OVMF" else ()),
            *("-kernel", str(image.kernel), "-initrd", str(image.initramfs)),
            *("-append", "console=ttyS0 panic=-1 end=poweroff"),
            *self.options,
        ]
        return Boot(command, workload_verdict(image.expected, self.cpus), serial)


def _flash(root: Path, scratch: Path) -> tuple[str, ...]:
    """OVMF in two flash chips; the variables are a copy, which the guest writes."""
    code, variables = (root / f"usr/share/OVMF/OVMF_{half}_4M.fd" for half in ("CODE", "VARS"))
    own = scratch / "variables.fd"
    shutil.copy(variables, own)
    return (
        *("-drive", f"if=pflash,format=raw,unit=0,readonly=on,file={code}"),
        *("-drive", f"if=pflash,format=raw,unit=1,file={own}"),
    )
