"""What a client's address space looks like, from /proc/PID/maps, and the files that its mappings show."""

from __future__ import annotations

import os
from typing import NamedTuple


class Vma(NamedTuple):
    """One line: bytes `start`..`end`, permissions as "rw-p", offset in the file, its device and inode, its name."""

    start: int
    end: int
    permissions: str
    offset: int
    device: int
    inode: int
    name: str

    @property
    def readable(self) -> bool:
        return self.permissions[0] == "r"

    @property
    def writable(self) -> bool:
        return self.permissions[1] == "w"

    @property
    def shared(self) -> bool:
        return self.permissions[3] == "s"

    @property
    def hugetlb(self) -> bool:
        return self.name.startswith(("/anon_hugepage", "/memfd:")) and "hugepage" in self.name


def find_vma(pid: int, address: int) -> Vma | None:
    """The mapping that holds `address`; None if there is none, or no such process. Linear in the mappings."""
    try:
        with open(f"/proc/{pid}/maps") as maps:
            for line in maps:
                bounds = line.split(" ", 1)[0]
                start, end = (int(part, 16) for part in bounds.split("-"))
                if start <= address < end:
                    return _parse(line, start, end)
                if start > address:
                    return None
    except OSError:
        return None
    return None


def open_mapped_file(pid: int, vma: Vma) -> int | None:
    """A descriptor of our own for the file of a shared mapping; None if the process has none open and we may not look.

    By one of the process's descriptors, or by /proc/PID/map_files, which needs CAP_CHECKPOINT_RESTORE.
    """
    for path in _descriptors(pid, vma):
        try:
            return os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue
    return None


def _descriptors(pid: int, vma: Vma) -> list[str]:
    directory = f"/proc/{pid}/fd"
    found = []
    try:
        for name in os.listdir(directory):
            path = f"{directory}/{name}"
            try:
                status = os.stat(path)
            except OSError:
                continue
            if status.st_ino == vma.inode and status.st_dev == vma.device:
                found.append(path)
    except OSError:
        pass
    return [*found, f"/proc/{pid}/map_files/{vma.start:x}-{vma.end:x}"]


def _parse(line: str, start: int, end: int) -> Vma:
    fields = line.split(None, 5)
    major, minor = (int(part, 16) for part in fields[3].split(":"))
    name = fields[5].strip() if len(fields) > 5 else ""
    return Vma(start, end, fields[1], int(fields[2], 16), os.makedev(major, minor), int(fields[4]), name)
