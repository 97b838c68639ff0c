"""`guestmem doctor`: what this machine offers guestmem, and what follows where it does not."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import typer
from rich.console import Console
from rich.text import Text

from guestmem.cli.huge_pages import SIZES
from guestmem.cpu import block
from guestmem.memory.host_pages import host_pages
from guestmem.memory.huge_backing import new_huge_backing
from guestmem.memory.pages import ORDER_2M
from guestmem.native import shim_path

_USERFAULTFD, _SECCOMP = 323, 317  # x86-64
_UFFD_USER_MODE_ONLY = 1
_SECCOMP_GET_ACTION_AVAIL, _SECCOMP_RET_USER_NOTIF = 2, 0x7FC0_0000
_libc = ctypes.CDLL(None, use_errno=True)


class Finding(NamedTuple):
    """`good` None: neither good nor bad, only worth knowing."""

    what: str
    good: bool | None
    says: str


def doctor() -> None:
    """Say what this machine offers and what is missing. Ends with 1 if `guestmem run` cannot work."""
    console = Console(highlight=False)
    findings = [check() for check in _CHECKS]
    for finding in findings:
        mark, style = {True: ("ok", "green"), False: ("no", "red"), None: ("--", "yellow")}[finding.good]
        console.print(Text.assemble((f"{mark:>4}  ", style), f"{finding.what}: {finding.says}"), soft_wrap=True)
    raise typer.Exit(1 if any(finding.good is False for finding in findings) else 0)


def _machine() -> Finding:
    good = platform.machine() == "x86_64" and platform.system() == "Linux"
    return Finding("machine", good, f"{platform.system()} {platform.release()} {platform.machine()}")


def _shim() -> Finding:
    path = shim_path()
    if path is not None:
        return Finding("shim", True, str(path))
    compiler = "there is gcc: reinstall guestmem" if shutil.which("gcc") else "install gcc, then reinstall guestmem"
    return Finding("shim", False, f"not built, so guestmem run cannot start; {compiler}")


def _userfaultfd() -> Finding:
    fd = _libc.syscall(_USERFAULTFD, os.O_CLOEXEC | _UFFD_USER_MODE_ONLY)
    if fd < 0:
        why = os.strerror(ctypes.get_errno())
        return Finding("userfaultfd", None, f"{why}: private pages are closed by mapping over them, which is slower")
    os.close(fd)
    return Finding("userfaultfd", True, "private pages are closed with it")


def _seccomp() -> Finding:
    action = ctypes.c_uint32(_SECCOMP_RET_USER_NOTIF)
    available = _libc.syscall(_SECCOMP, _SECCOMP_GET_ACTION_AVAIL, 0, ctypes.byref(action)) == 0
    says = "static clients can be run" if available else "no user notification: static clients cannot be run"
    return Finding("seccomp", available or None, says)


def _ptrace() -> Finding:
    scope = _read("/proc/sys/kernel/yama/ptrace_scope") or "0"
    says = f"yama ptrace_scope {scope}: static clients " + ("cannot be run" if scope == "3" else "can be traced")
    return Finding("ptrace", scope != "3" or None, says)


def _cpus() -> Finding:
    count = len(os.sched_getaffinity(0))
    says = "a call waits without sleeping" if count > 1 else "one only: every call costs a wake-up"
    return Finding("CPUs", count > 1 or None, f"{count}; {says}")


def _kvm() -> Finding:
    if os.access("/dev/kvm", os.R_OK | os.W_OK):
        return Finding("/dev/kvm", None, "there is a real one: tests compare with it, guestmem run does not use it")
    return Finding("/dev/kvm", None, "none, and none is needed")


def _huge_pages() -> Finding:
    """What a file of huge pages would be made of here and now, by making one."""
    pools = []
    files = []
    for size, order in SIZES.items():
        pool = host_pages(order)
        if pool is not None:
            pools.append(f"{size}: {pool.total} reserved, {pool.available} free")
        files.append(f"a file of {size} pages is {_memory_of(order, mappable=False)}")
    files.append(f"one that clients may map is {_memory_of(ORDER_2M, mappable=True)}")
    says = "; ".join((", ".join(pools) or "none in this kernel", *files))
    return Finding("huge pages", True if "hugetlb" in says or "THP" in says else None, says)


def _memory_of(order: int, mappable: bool) -> str:
    backing = new_huge_backing(1 << order, "guestmem:doctor", order, mappable=mappable)
    try:
        return backing.kind
    finally:
        backing.close()


def _nodes() -> Finding:
    return Finding("NUMA nodes", None, _read("/sys/devices/system/node/online") or "0")


def _engine() -> Finding:
    missing = block.missing()
    if missing is None:
        return Finding("CPU engine", True, str(block.LIBRARY))
    compiler = "there is gcc: reinstall guestmem" if shutil.which("gcc") else "install gcc, then reinstall guestmem"
    return Finding("CPU engine", False, f"{missing}; {compiler}")


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


_CHECKS: tuple[Callable[[], Finding], ...] = (
    _machine,
    _shim,
    _engine,
    _userfaultfd,
    _cpus,
    _seccomp,
    _ptrace,
    _kvm,
    _huge_pages,
    _nodes,
)
