"""What boots: Debian's kernel as it is, and an initramfs made here of busybox, a compiled workload and an init."""

from __future__ import annotations

import gzip
import shutil
import struct
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tests.vmms.cache import CannotHaveError, quiet

HERE = Path(__file__).parent / "guest"
SCRIPTS = ("report.sh", "workload.sh")
_COMPILE = ("gcc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-static")
_FOLDER, _FILE, _LINK, _CHARACTER = 0o040755, 0o100755, 0o120777, 0o020600
_MODULES = (  # in the order in which they are loaded
    "drivers/virtio/virtio_ring", "drivers/virtio/virtio", "drivers/virtio/virtio_pci_legacy_dev",
    "drivers/virtio/virtio_pci_modern_dev", "drivers/virtio/virtio_pci", "drivers/virtio/virtio_mmio",
    "drivers/block/virtio_blk",
)  # fmt: skip


def build_workload(folder: Path) -> Path:
    """The compiled half of the workload, static. Raises: CannotHaveError."""
    if not shutil.which("gcc"):
        raise CannotHaveError("no gcc")
    program = folder / "workload"
    source = HERE / "workload.c"
    if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
        quiet([*_COMPILE, "-o", str(program), str(source)])
    return program


def expected_output(busybox: Path, workload: Path) -> str:
    """What the workload prints on this machine."""
    return quiet([str(busybox), "sh", str(HERE / "workload.sh"), str(busybox), str(workload)], timeout=60)


def kernel_of(root: Path) -> Path:
    """The bzImage of an unpacked linux-image package."""
    return next((root / "boot").glob("vmlinuz-*"))


def extract_elf(kernel: Path, target: Path, tools: Mapping[str, Path | str]) -> Path:
    """The vmlinux inside a bzImage: for VMMs that load nothing else. `tools`: a decompressor by its name.

    Raises: CannotHaveError. Source: Documentation/arch/x86/boot.rst, setup_sects, payload_offset, payload_length.
    """
    if target.exists() and target.stat().st_mtime >= kernel.stat().st_mtime:
        return target
    image = kernel.read_bytes()
    setup_sectors, (offset, length) = image[0x1F1] or 4, struct.unpack_from("<II", image, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    payload = image[start : start + length]
    name, *options = next((command for magic, command in _DECOMPRESSORS if payload.startswith(magic)), ["cat"])
    # The kernel's build appends the size to the stream, which makes some of them complain at the end.
    done = subprocess.run([str(tools.get(name, name)), *options], input=payload, capture_output=True)
    if not done.stdout.startswith(b"\x7fELF"):
        raise CannotHaveError(f"no vmlinux in {kernel.name}: {done.stderr.decode(errors='replace').strip()}")
    target.write_bytes(done.stdout)
    return target


_DECOMPRESSORS = (
    (b"\xfd7zXZ\0", ["xz", "-dc", "--single-stream"]),
    (b"\x28\xb5\x2f\xfd", ["zstd", "-dcq"]),
    (b"\x1f\x8b\x08", ["gzip", "-dcq"]),
    (b"\x02\x21\x4c\x18", ["lz4", "-dcq"]),
)


def write_initramfs(target: Path, kernel_root: Path, busybox: Path, workload: Path) -> Path:
    """A gzipped cpio archive, "newc". Source: Documentation/driver-api/early-userspace/buffer-format.rst."""
    entries: list[tuple[str, int, bytes, tuple[int, int]]] = [
        *((name, _FOLDER, b"", (0, 0)) for name in ("bin", "dev", "proc", "sys", "modules")),
        ("dev/console", _CHARACTER, b"", (5, 1)),
        ("bin/busybox", _FILE, busybox.read_bytes(), (0, 0)),
        ("bin/sh", _LINK, b"busybox", (0, 0)),
        ("workload", _FILE, workload.read_bytes(), (0, 0)),
        ("init", _FILE, (HERE / "init.sh").read_bytes(), (0, 0)),
        *((name, _FILE, (HERE / name).read_bytes(), (0, 0)) for name in SCRIPTS),
    ]
    for number, module in enumerate(_found_modules(kernel_root)):
        entries.append((f"modules/{number:02}-{module.stem}.ko", _FILE, module.read_bytes(), (0, 0)))
    entries.append(("TRAILER!!!", 0, b"", (0, 0)))
    archive = b"".join(_cpio_entry(inode, *entry) for inode, entry in enumerate(entries, 1))
    target.write_bytes(gzip.compress(archive, 1, mtime=0))
    return target


def write_root(folder: Path, busybox: Path, workload: Path) -> Path:
    """The same as a folder, for a VMM that shares one with its guest and has an init of its own."""
    for name in ("bin", "dev", "etc", "proc", "root", "sys", "tmp"):
        (folder / name).mkdir(parents=True)
    shutil.copy(busybox, folder / "bin/busybox")
    (folder / "bin/sh").symlink_to("busybox")
    shutil.copy(workload, folder / "workload")
    for name in SCRIPTS:
        shutil.copy(HERE / name, folder / name)
    (folder / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (folder / "etc/group").write_text("root:x:0:\n")
    return folder


def _found_modules(kernel_root: Path) -> Iterator[Path]:
    """Those that the kernel does not have built in."""
    for name in _MODULES:
        yield from kernel_root.glob(f"lib/modules/*/kernel/{name}.ko")


def _cpio_entry(inode: int, name: str, mode: int, data: bytes, device: tuple[int, int]) -> bytes:
    encoded = name.encode() + b"\0"
    numbers: Sequence[int] = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(encoded), 0)
    header = b"070701" + b"".join(f"{number:08X}".encode() for number in numbers)
    return _padded(header + encoded) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
