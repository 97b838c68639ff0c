"""kvmtool, Firecracker, libkrun and Hyperlight."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.vmms.boot import Boot, workload_verdict
from tests.vmms.guest import write_root
from tests.vmms.kvm_ioctls import tests_verdict
from tests.vmms.parts import Parts
from tests.vmms.qemu import Qemu

MEMORY_MIB = 256
_END = "panic=-1 reboot=k end=reboot"  # neither has ACPI to power off by


@dataclass(frozen=True)
class Kvmtool:
    """lkvm, with the same kernel and initramfs."""

    cpus: int = 1

    @property
    def label(self) -> str:
        return f"kvmtool {self.cpus} vCPU"

    def peer(self) -> Qemu:
        return Qemu("7.2", cpus=self.cpus, accel="tcg")

    def boot(self, parts: Parts, scratch: Path) -> Boot:
        program, image = parts.kvmtool(), parts.image()
        command = [
            *(
                "env",
                f"HOME={scratch}",
                str(program),
                "run",
                "--no-dhcp",
                "--console",
                "serial",
            ),
            *("--name", f"guestmem-{self.cpus}", "-c", str(self.cpus), "-m", str(MEMORY_MIB)),
            *("-k", str(image.kernel), "-i", str(image.initramfs), "-p", f"console=ttyS0 {_END}"),
        ]
        return Boot(command, workload_verdict(image.expected, self.cpus))


@dataclass(frozen=True)
class Firecracker:
    """With its own seccomp filter, as it is used, or without."""

    cpus: int = 1
    seccomp: bool = True

    @property
    def label(self) -> str:
        return f"Firecracker {self.cpus} vCPU {'seccomp' if self.seccomp else 'no-seccomp'}"

    def peer(self) -> Qemu:
        return Qemu("7.2", "microvm", cpus=self.cpus, accel="tcg")

    def boot(self, parts: Parts, scratch: Path) -> Boot:
        program, image = parts.firecracker(), parts.image()
        configuration = {
            "boot-source": {
                "kernel_image_path": str(image.elf),
                "initrd_path": str(image.initramfs),
                "boot_args": f"console=ttyS0 pci=off {_END}",
            },
            "drives": [],
            "machine-config": {"vcpu_count": self.cpus, "mem_size_mib": MEMORY_MIB},
        }
        path = scratch / "firecracker.json"
        path.write_text(json.dumps(configuration))
        options = [] if self.seccomp else ["--no-seccomp"]
        command = [str(program), *options, "--no-api", "--config-file", str(path)]
        return Boot(command, workload_verdict(image.expected, self.cpus))


@dataclass(frozen=True)
class Libkrun:
    """By microsandbox, with the kernel that libkrunfw has inside; the root is a folder of the host (virtio-fs)."""

    cpus: int = 1

    @property
    def label(self) -> str:
        return f"libkrun {self.cpus} vCPU"

    def peer(self) -> Qemu:
        return Qemu("7.2", "microvm", cpus=self.cpus, accel="tcg")

    def boot(self, parts: Parts, scratch: Path) -> Boot:
        bundle, image = parts.microsandbox(), parts.image()
        root = write_root(scratch / "root", image.busybox, image.workload)
        command = [
            *("env", f"HOME={scratch}", f"MSB_HOME={scratch}/msb", str(bundle / "bin/msb"), "run"),
            *("--no-tty", "--no-stdin", "-c", str(self.cpus), "-m", f"{MEMORY_MIB}M", str(root)),
            *("--", "/bin/sh", "/report.sh"),
        ]
        return Boot(command, workload_verdict(image.expected, self.cpus))


@dataclass(frozen=True)
class KvmIoctls:
    """No VMM, but the tests of the crate that Rust's VMMs use."""

    @property
    def label(self) -> str:
        return "kvm-ioctls tests"

    def peer(self) -> None:
        """It boots nothing."""

    def boot(self, parts: Parts, scratch: Path) -> Boot:
        # Some fail on any kernel of today, and so does the program, whose exit code then says nothing.
        command = ["sh", "-c", f"{parts.kvm_ioctls()} --test-threads=1; true"]
        return Boot(command, tests_verdict)


@dataclass(frozen=True)
class Hyperlight:
    """A function in a micro-VM without an operating system: it has no console and no kernel, but a result."""

    backend: str

    @property
    def label(self) -> str:
        return f"Hyperlight {self.backend}"

    def peer(self) -> None:
        """Nothing else runs what it runs."""

    def boot(self, parts: Parts, scratch: Path) -> Boot:
        folder = parts.hyperlight()
        program = Path(__file__).parent / "guest/hyperlight.py"
        command = ["env", f"PYTHONPATH={folder}", sys.executable, str(program), self.backend]
        return Boot(command, lambda console: "" if "result 42\n" in console else "no result 42")
