"""What happened during a run, for `--explain`: calls by kind, refusals with their rules, what was not served."""

from __future__ import annotations

import traceback
from collections import Counter
from typing import TYPE_CHECKING

from guestmem.iommu.device import DeviceStatistics
from guestmem.memory import InodeStatistics
from guestmem.serve.files import GmemFile, ServedFile, VfioFile
from guestmem.serve.ioctl_names import ioctl_name
from guestmem.serve.wire import RUN_OWN, FileKind, Op, Request
from guestmem.trace import Refusal

if TYPE_CHECKING:
    from guestmem.serve.call import Call
    from guestmem.serve.client import Client

_ORDINARY = ("run.interrupted",)
_CALLS = {
    Op.OPEN: "open",
    Op.MMAP_DONE: "mmap of a guest_memfd",
    Op.FALLOCATE: "fallocate",
    Op.REMOVE: "madvise(MADV_REMOVE)",
    Op.RUN_FD: "mmap of a vCPU",
}
_KINDS = {
    FileKind.KVM: "/dev/kvm",
    FileKind.VM: "VM",
    FileKind.VCPU: "vCPU",
    FileKind.GMEM: "guest_memfd",
    FileKind.GUP_TEST: "gup_test",
    FileKind.IOMMU: "/dev/iommu",
    FileKind.VFIO: "VFIO device",
    FileKind.LIVE_UPDATE: "/dev/liveupdate",
    FileKind.SESSION: "live update session",
}


class Report:
    """Counts only; a run of millions of calls costs one dictionary entry for each kind."""

    def __init__(self) -> None:
        self._requests: Counter[tuple[int, int]] = Counter()  # by op and, for ioctls, number
        self.refusals: Counter[tuple[str, str, str]] = Counter()  # by call, rule and what firmware said
        self.examples: dict[tuple[str, str, str], str] = {}  # the first of each, with its numbers
        self.unknown: Counter[tuple[str, int]] = Counter()
        self.bugs: list[str] = []
        self.left_open: Counter[str] = Counter()
        self.memory: list[InodeStatistics] = []  # of each guest_memfd, at its end
        self.devices: list[DeviceStatistics] = []  # of each open device file, at its end
        self.clients: list[tuple[int, str]] = []
        self.notes: list[str] = []

    def count(self, request: Request) -> None:
        if request.op == Op.RUN_FD and request.a == RUN_OWN:
            return
        self._requests[request.op, request.a if request.op == Op.IOCTL else 0] += 1

    @property
    def calls(self) -> Counter[str]:
        """How often each call of a client was made, by name; what the shim asks for itself is left out."""
        named: Counter[str] = Counter()
        for (op, number), count in self._requests.items():
            if op == Op.IOCTL:
                named[ioctl_name(number & 0xFFFF_FFFF)] += count
            elif op in _CALLS:
                named[_CALLS[Op(op)]] += count
        return named

    def client(self, client: Client) -> None:
        self.clients.append((client.pid, client.name()))

    def refused(self, call: Call, refusal: Refusal) -> None:
        if refusal.rule in _ORDINARY:
            return
        if refusal.rule == "ioctl.unknown":
            self.unknown[str(refusal.facts.get("on")), call.request.a & 0xFFFF_FFFF] += 1
            return
        kind = call_name(call), refusal.rule, str(refusal.facts.get("code", ""))
        self.refusals[kind] += 1
        self.examples.setdefault(kind, str(refusal))

    def closed(self, file: ServedFile) -> None:
        """The last descriptor of a file is gone: by close(), or because the process that made it ends."""
        if file.owner is not None and _is_ending(file.owner.pid):
            self.left_open[_KINDS[file.kind]] += 1

    def released(self, file: ServedFile) -> None:
        if isinstance(file, GmemFile) and file.last_words is not None:
            self.memory.append(file.last_words)
        elif isinstance(file, VfioFile):
            self.devices.append(file.vfio.device.statistics())

    def failed(self, call: Call, bug: Exception) -> None:
        """An error that is no refusal is a bug of ours: the client got EIO."""
        self.bug(call_name(call), bug)

    def bug(self, what: str, bug: Exception) -> None:
        """The same, outside of a call of the wire."""
        self.bugs.append(f"{what}:\n{''.join(traceback.format_exception(bug))}")


def call_name(call: Call) -> str:
    """KVM_CREATE_VM, or the name of what is no ioctl."""
    request = call.request
    if request.op == Op.IOCTL:
        return ioctl_name(request.a & 0xFFFF_FFFF)
    return Op(request.op).name.lower()


_PF_EXITING = 0x4


def _is_ending(pid: int) -> bool:
    """Whether a process is on its way out, or gone. Source: man 5 proc, /proc/PID/stat field 9."""
    try:
        with open(f"/proc/{pid}/stat") as status:
            fields = status.read().rpartition(")")[2].split()
    except OSError:
        return True
    return bool(int(fields[6]) & _PF_EXITING)
