"""Linux 7.4 as applied, in its two builds: where they answer otherwise than 7.3 and than each other."""

from __future__ import annotations

import errno

import pytest

from guestmem.kvm.ioctl import ioctl
from guestmem.kvm.mmu import FaultResult, page_fault
from guestmem.memory import Access
from guestmem.serve.capabilities import check_extension
from guestmem.trace import Refusal
from guestmem.uapi import kvm as uapi
from guestmem.uapi.kvm import VmType
from guestmem.uapi.levels import LEVELS
from tests.kvm.conftest import Bench, K

BOTH_BUILDS = ("v7.4", "v7.4-vm-attributes")
UNREACHABLE = 1 << 52
PRIVATE = uapi.KVM_MEMORY_ATTRIBUTE_PRIVATE


@pytest.mark.parametrize(
    ("level", "refused"),
    [
        ("v6.18", (errno.EINVAL, "bind.overlap")),
        ("v7.3", (errno.EEXIST, "bind.overlap")),
        *((level, (errno.EINVAL, "region.unreachable")) for level in BOTH_BUILDS),
    ],
)
def test_a_range_that_is_bound_at_frames_that_no_guest_has(level: str, refused: tuple[int, str]) -> None:
    """kvm_main.c @537ec2b15fdd: kvm_prepare_memory_region, then the binding is committed."""
    bench = Bench(level=LEVELS[level], vm_type=VmType.DEFAULT)
    gmem = bench.gmem()
    with pytest.raises(Refusal) as caught:
        bench.vm.set_memory_region(1, UNREACHABLE, K, gmem=gmem)
    assert (caught.value.errno, caught.value.rule) == refused
    with pytest.raises(Refusal) as caught:
        bench.vm.set_memory_region(1, UNREACHABLE, K, gmem=gmem, offset=8 * K)
    assert caught.value.rule == "bind.past_end", "what is wrong with the file itself comes first at every level"
    bench.vm.set_memory_region(0, 0, 0)
    with pytest.raises(Refusal, match=r"region\.unreachable"):
        bench.vm.set_memory_region(1, UNREACHABLE, K, gmem=gmem)
    bench.vm.set_memory_region(1, 0, 8 * K, gmem=gmem)  # nothing is left bound
    bench.close()


@pytest.mark.parametrize(
    ("level", "on_vm", "on_file"),
    [("v7.3", "ok", "ENOTTY"), ("v7.4", "ENOTTY", "ok"), ("v7.4-vm-attributes", "ok", "ENOTTY")],
)
def test_each_build_has_one_of_the_two_calls(level: str, on_vm: str, on_file: str) -> None:
    """CONFIG_KVM_VM_MEMORY_ATTRIBUTES builds the VM's; without it pages are converted in place."""
    bench = Bench(level=LEVELS[level])
    gmem = bench.gmem(mmap=False, init_shared=False)

    def answer(fd: int, request: int) -> str:
        try:
            bench.run(ioctl(bench.host.process, fd, request, 0))
        except Refusal as refusal:
            return errno.errorcode[refusal.errno or 0].replace("EFAULT", "ok")  # got as far as the argument
        return "ok"

    assert answer(bench.vm.fd, uapi.KVM_SET_MEMORY_ATTRIBUTES) == on_vm
    assert answer(gmem.fd, uapi.KVM_SET_MEMORY_ATTRIBUTES2) == on_file
    bench.close()


@pytest.mark.parametrize(
    ("level", "by_vm", "by_file"), [("v7.3", PRIVATE, 0), ("v7.4", 0, PRIVATE), ("v7.4-vm-attributes", PRIVATE, 0)]
)
def test_capabilities_say_who_has_the_attributes(level: str, by_vm: int, by_file: int) -> None:
    """233 and 252 of /dev/kvm and of a VM with private memory; a default VM has neither."""
    bench = Bench(level=LEVELS[level])
    default = bench.host.create_vm(VmType.DEFAULT).kvm
    for kvm in (None, bench.vm.kvm):
        assert check_extension(bench.host.level, kvm, 233) == by_vm
        assert check_extension(bench.host.level, kvm, 252) == by_file
    assert check_extension(bench.host.level, default, 233) == 0
    assert check_extension(bench.host.level, default, 252) == 0
    bench.close()


def test_the_builds_of_7_4_decide_what_a_protected_vm_may_be_born_with() -> None:
    """INIT_SHARED needs pages that can become private in place."""
    legal = {}
    for level in BOTH_BUILDS:
        bench = Bench(level=LEVELS[level])
        legal[level] = check_extension(bench.host.level, bench.vm.kvm, 244)
        bench.close()
    assert legal == {"v7.4": 0b11, "v7.4-vm-attributes": 0b01}


def test_a_deleted_slot_counts_as_shared_where_pages_carry_their_access() -> None:
    """x86/private_mem_kvm_exits_test @37e0791600e5: MMIO in place, a memory fault by attributes of the VM."""
    in_place = Bench(level=LEVELS["v7.4"])
    in_place.gmem(mmap=False, init_shared=False)
    assert in_place.run(page_fault(in_place.vm.kvm, 0, write=False)) is FaultResult.MAPPED
    in_place.vm.set_memory_region(0, 0, 0)
    assert in_place.run(page_fault(in_place.vm.kvm, 0, write=False)) is FaultResult.MMIO
    in_place.close()
    by_vm = Bench(level=LEVELS["v7.4-vm-attributes"])
    gmem = by_vm.gmem(mmap=False, init_shared=False, gpa=None)
    by_vm.vm.set_memory_region(0, 0, 8 * K, gmem=gmem, memory=by_vm.host.anonymous(8 * K))
    by_vm.vm.set_attributes(0, K, Access.PRIVATE)
    assert by_vm.run(page_fault(by_vm.vm.kvm, 0, write=False)) is FaultResult.MAPPED
    by_vm.vm.set_memory_region(0, 0, 0)
    with pytest.raises(Refusal, match=r"EFAULT \[fault\.no_slot\]"):
        by_vm.run(page_fault(by_vm.vm.kvm, 0, write=False))
    by_vm.close()
