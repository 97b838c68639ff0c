"""ioctl(2): which file knows which call, who may call, and what an unreadable argument is. Golden rows K, N, G, S."""

from __future__ import annotations

import pytest

from guestmem.cpu.scripted import ScriptedEngine
from guestmem.host import Host
from guestmem.kvm.ioctl import ioctl
from guestmem.memory import PAGE_SIZE
from guestmem.trace import Refusal, errno_name
from guestmem.uapi import kvm as uapi
from guestmem.uapi.kvm import VmType
from guestmem.uapi.levels import LEVELS
from guestmem.uapi.structs import CreateGuestMemfd, PreFaultMemory, UserspaceMemoryRegion2
from tests.kvm.conftest import Bench

K = PAGE_SIZE
UNKNOWN = 0xAEFF
LINK = 0xC040AED6
CONVERT_SHARED = 0xC040AF41


def answer(host: Host, fd: int, request: int, argument: int = 0) -> str:
    try:
        return str(host.run(ioctl(host.process, fd, request, argument)))
    except Refusal as refusal:
        return errno_name(refusal.errno)


@pytest.mark.parametrize(
    ("on", "request_", "expected"),
    [
        ("gmem", UNKNOWN, "ENOTTY"),  # K1
        ("gmem", 0xDEADBEEF, "ENOTTY"),  # K2
        ("gmem", uapi.KVM_CREATE_GUEST_MEMFD, "ENOTTY"),  # K4
        ("gmem", uapi.KVM_SET_MEMORY_ATTRIBUTES, "ENOTTY"),  # K5
        ("gmem", uapi.KVM_SET_MEMORY_ATTRIBUTES2, "ENOTTY"),  # K6
        ("vm", uapi.KVM_SET_MEMORY_ATTRIBUTES2, "ENOTTY"),  # K8
        ("vm", LINK, "ENOTTY"),  # K9
        ("gmem", CONVERT_SHARED, "ENOTTY"),  # K10
        ("vm", uapi.KVM_PRE_FAULT_MEMORY, "ENOTTY"),  # K11
        ("gmem", uapi.KVM_PRE_FAULT_MEMORY, "ENOTTY"),  # K12
        ("gmem", uapi.KVM_SET_USER_MEMORY_REGION2, "ENOTTY"),  # K13
        ("vm", UNKNOWN, "ENOTTY"),  # golden surprise 10
        ("vcpu", UNKNOWN, "EINVAL"),
        ("vm", 0xC038AED4, "ENOTTY"),  # N27: wrong size
        ("vm", 0x4040AED4, "ENOTTY"),  # N28: wrong direction
        ("vcpu", uapi.KVM_CREATE_GUEST_MEMFD, "EINVAL"),  # N33
        ("vcpu", uapi.KVM_SET_MEMORY_ATTRIBUTES, "EINVAL"),  # G44
        ("vm", uapi.KVM_CREATE_GUEST_MEMFD, "EFAULT"),  # N24
        ("vm", uapi.KVM_SET_USER_MEMORY_REGION2, "EFAULT"),  # R64
    ],
)
def test_each_file_answers_as_linux_6_18(on: str, request_: int, expected: str) -> None:
    with Host(level=LEVELS["v6.18"], engine=lambda memory: ScriptedEngine(memory, [])) as host:
        vm = host.create_vm(VmType.DEFAULT)
        fds = {"vm": vm.fd, "gmem": vm.create_guest_memfd(K).fd, "vcpu": vm.create_vcpu().fd}
        assert answer(host, fds[on], request_) == expected


def test_a_closed_descriptor_is_ebadf(bench: Bench) -> None:
    assert answer(bench.host, 999, uapi.KVM_CREATE_GUEST_MEMFD) == "EBADF"


def test_another_address_space_may_use_the_file_and_not_the_vm(bench: Bench) -> None:
    """Rows S4 to S7, G45; golden surprise 9."""
    gmem = bench.gmem(gpa=None)
    vcpu = bench.vcpu()
    child = bench.run(bench.host.process.fork())
    scratch = bench.host.anonymous(K)
    for fd, request in ((bench.vm.fd, uapi.KVM_CREATE_GUEST_MEMFD), (vcpu.fd, uapi.KVM_PRE_FAULT_MEMORY)):
        with pytest.raises(Refusal) as caught:
            bench.run(ioctl(child, fd, request, scratch.hva))
        assert (errno_name(caught.value.errno), caught.value.rule) == ("EIO", "ioctl.other_mm")
    bench.run(gmem.inode.fallocate(1, 0, K))
    child_view = bench.run(child.mmap(gmem.fd, K))
    assert bench.run(child.mm.read(child_view, 1)) == b"\0"
    bench.run(child.exit())


def test_a_whole_set_up_by_ioctl_alone(bench: Bench) -> None:
    scratch = bench.host.anonymous(K)
    scratch.write(0, CreateGuestMemfd(4 * K, 3).pack())
    fd = int(answer(bench.host, bench.vm.fd, uapi.KVM_CREATE_GUEST_MEMFD, scratch.hva))
    scratch.write(0, UserspaceMemoryRegion2(0, 4, 0x10000, 4 * K, guest_memfd=fd).pack())
    assert answer(bench.host, bench.vm.fd, uapi.KVM_SET_USER_MEMORY_REGION2, scratch.hva) == "0"
    vcpu = bench.vcpu()
    scratch.write(0, PreFaultMemory(0x11000, 8 * K).pack())
    assert answer(bench.host, vcpu.fd, uapi.KVM_PRE_FAULT_MEMORY, scratch.hva) == "0"
    left = PreFaultMemory.unpack(scratch.read(0, PreFaultMemory.SIZE))
    assert (left.gpa, left.size) == (0x14000, 5 * K)


def test_a_descriptor_closed_during_a_call_does_not_take_the_file_away(bench: Bench) -> None:
    gmem = bench.gmem()
    scratch = bench.host.anonymous(K)
    scratch.write(0, CreateGuestMemfd(K, 0).pack())
    order: list[str] = []

    async def call() -> None:
        await ioctl(bench.host.process, bench.vm.fd, uapi.KVM_CREATE_GUEST_MEMFD, scratch.hva)
        order.append("called")

    async def close() -> None:
        await bench.host.process.fds.close(bench.vm.fd)
        order.append("closed")

    bench.host.scheduler.spawn(call(), "call")
    bench.host.scheduler.spawn(close(), "close")
    bench.host.scheduler.drain()
    assert sorted(order) == ["called", "closed"]
    gmem.close()
