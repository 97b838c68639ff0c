"""KVM_SET_MEMORY_ATTRIBUTES, by guest frame: levels before in-place conversion."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from guestmem.cpu.scripted import Load, Store
from guestmem.kvm.exits import HltExit, MemoryFaultExit
from guestmem.kvm.vm_attributes import set_memory_attributes
from guestmem.memory import PAGE_SIZE, Access
from guestmem.trace import Refusal
from guestmem.uapi.kvm import KVM_MEMORY_ATTRIBUTE_PRIVATE as PRIVATE
from guestmem.uapi.kvm import VmType
from guestmem.uapi.levels import LEVELS
from guestmem.uapi.structs import MemoryAttributes
from tests.kvm.conftest import Bench

K = PAGE_SIZE


@pytest.fixture
def old() -> Iterator[Bench]:
    made = Bench(level=LEVELS["v6.12"])
    yield made
    made.close()


def refused(bench: Bench, address: int, size: int, attributes: int, flags: int = 0) -> tuple[int | None, str]:
    with pytest.raises(Refusal) as caught:
        bench.run(set_memory_attributes(bench.vm.kvm, MemoryAttributes(address, size, attributes, flags)))
    return caught.value.errno, caught.value.rule


MISUSES = [  # each with every later fault beside it
    ((1, 2**64 - 1, 1, 1), "attributes.flags"),
    ((1, 2**64 - 1, 1, 0), "attributes.attributes"),
    ((1, 2**64 - 1, PRIVATE, 0), "attributes.range"),
    ((0, 0, PRIVATE, 0), "attributes.range"),
    ((2**64 - K, K, PRIVATE, 0), "attributes.range"),
    ((1, K, PRIVATE, 0), "attributes.unaligned"),
    ((0, 1, PRIVATE, 0), "attributes.unaligned"),
]


@pytest.mark.parametrize(("call", "rule"), MISUSES)
def test_misuse_by_rule_and_in_order(old: Bench, call: tuple[int, int, int, int], rule: str) -> None:
    assert refused(old, *call) == (errno.EINVAL, rule)


@pytest.mark.parametrize(
    ("level", "vm_type"),
    [("v6.12", VmType.DEFAULT), ("v7.4", VmType.SW_PROTECTED), ("v7.4-vm-attributes", VmType.DEFAULT)],
)
def test_where_there_is_no_attribute_private_is_refused_and_zero_is_nothing(level: str, vm_type: VmType) -> None:
    """A VM without private memory has none; with in-place conversion the file keeps it (v8 10/46)."""
    bench = Bench(level=LEVELS[level], vm_type=vm_type)
    assert refused(bench, 0, K, PRIVATE) == (errno.EINVAL, "attributes.attributes")
    bench.run(set_memory_attributes(bench.vm.kvm, MemoryAttributes(0, K, 0)))
    bench.close()


def test_private_and_shared_memory_are_two_memories(old: Bench) -> None:
    """spec/uapi.md section 10: the attribute chooses the side; the other side's bytes stay where they are."""
    gmem = old.gmem(mmap=False, init_shared=False, gpa=None)
    memory = old.host.anonymous(8 * K)
    old.vm.set_memory_region(0, 0, 8 * K, gmem=gmem, memory=memory)
    memory[K] = 0x11
    assert old.guest(Load(K), Store(K, 0x12)) == (HltExit(), [0x11])
    assert memory[K] == 0x12
    assert gmem.statistics().allocated == 0
    old.vm.set_attributes(K, K, Access.PRIVATE)
    assert old.guest(Load(K), Store(K, 0x99), Load(0)) == (HltExit(), [0, 0])
    assert memory[K] == 0x12
    assert gmem.statistics().allocated == 1
    old.vm.set_attributes(0, 8 * K, Access.SHARED)
    assert old.guest(Load(K)) == (HltExit(), [0x12])
    old.vm.set_attributes(K, K, Access.PRIVATE)
    assert old.guest(Load(K)) == (HltExit(), [0x99])


def test_attributes_need_no_memslot_and_are_kept_for_a_later_one(old: Bench) -> None:
    old.vm.set_attributes(1 << 40, 4 * K, Access.PRIVATE)
    gmem = old.gmem(mmap=False, init_shared=False, gpa=None)
    old.vm.set_memory_region(0, 1 << 40, 8 * K, gmem=gmem)
    assert old.guest(Store((1 << 40) + K, 5), Load((1 << 40) + K)) == (HltExit(), [5])


def test_private_without_guest_memfd_is_a_memory_fault(old: Bench) -> None:
    memory = old.host.anonymous(K)
    old.vm.set_memory_region(0, 0, K, memory=memory)
    old.vm.set_attributes(0, K, Access.PRIVATE)
    exit_, _ = old.guest(Load(0x123))
    assert isinstance(exit_, MemoryFaultExit)
    assert (exit_.gpa, exit_.size, exit_.private) == (0, K, True)
    assert (exit_.refusal.errno, exit_.refusal.rule) == (errno.EFAULT, "fault.no_gmem")


def test_setting_what_is_already_set_tells_nobody(old: Bench) -> None:
    old.vm.set_attributes(0, K, Access.SHARED)
    sequence = old.vm.kvm.stage2.window.sequence.read()
    old.gmem(mmap=False, init_shared=False)
    old.vm.set_attributes(0, K, Access.SHARED)
    assert old.vm.kvm.stage2.window.sequence.read() == sequence
    old.vm.set_attributes(0, K, Access.PRIVATE)
    assert old.vm.kvm.stage2.window.sequence.moved_since(sequence)
