"""KVM_CREATE_GUEST_MEMFD and KVM_SET_MEMORY_ATTRIBUTES2: every misuse row, in the kernel's order."""

from __future__ import annotations

import errno
import struct

import pytest

from guestmem.host import Gmem, Host, Vm
from guestmem.kvm.gmem import create_guest_memfd, set_memory_attributes2, supported_flags
from guestmem.kvm.ioctl import ioctl
from guestmem.memory import PAGE_SIZE, Access
from guestmem.trace import Refusal
from guestmem.uapi import kvm as uapi
from guestmem.uapi.kvm import VmType
from guestmem.uapi.levels import LEVELS
from guestmem.uapi.structs import CreateGuestMemfd, MemoryAttributes2
from guestmem.userspace import FdTable
from tests.explore import Follow, every_schedule
from tests.kvm.conftest import Bench, ask

K = PAGE_SIZE
PRIVATE = uapi.KVM_MEMORY_ATTRIBUTE_PRIVATE
HUGE = 0x7FFF_FFFF_FFFF_F000


# Create


CREATE_ROWS = [
    ("N1", 0, "EINVAL"),
    ("N2", 1, "EINVAL"),
    ("N3", 0xFFF, "EINVAL"),
    ("N4", 0x1000, "fd"),
    ("N5", 0x1001, "EINVAL"),
    ("N6", 0x200000, "fd"),
    ("N7", 0x10000000000, "fd"),
    ("N8", 0x4000000000000000, "fd"),
    ("N9", HUGE, "fd"),
    ("N10", 0x7FFFFFFFFFFFFFFF, "EINVAL"),
    ("N11", 0x8000000000000000, "EINVAL"),
    ("N12", 0xFFFFFFFFFFFFF000, "EINVAL"),
    ("N13", 0xFFFFFFFFFFFFFFFF, "EINVAL"),
]


@pytest.mark.parametrize("flags", range(4))
@pytest.mark.parametrize(("row", "size", "expected"), CREATE_ROWS, ids=[row[0] for row in CREATE_ROWS])
def test_create_answers_as_linux_6_18(row: str, size: int, expected: str, flags: int) -> None:
    with Host(level=LEVELS["v6.18"]) as host:
        vm = host.create_vm(VmType.DEFAULT)
        answer, after = ask(host, vm.fd, uapi.KVM_CREATE_GUEST_MEMFD, CreateGuestMemfd(size, flags).pack())
        assert after == CreateGuestMemfd(size, flags).pack(), "row N29: the argument is not written"
        if expected == "fd":
            assert int(answer) > vm.fd
            assert host.inodes[0].size == size
        else:
            assert answer == expected
            assert not host.inodes


@pytest.mark.parametrize("flags", [4, 5, 8, 0x10, 0x80000000, 0x100000000, 0x8000000000000000, 2**64 - 1])
@pytest.mark.parametrize("size", [0, K])
def test_unknown_flags_are_refused_before_the_size(flags: int, size: int) -> None:
    """Rows N14 to N21."""
    with Host(level=LEVELS["v6.18"]) as host:
        vm = host.create_vm(VmType.DEFAULT)
        with pytest.raises(Refusal) as caught:
            host.run(create_guest_memfd(vm.kvm, host.process.fds, CreateGuestMemfd(size, flags)))
        assert (caught.value.errno, caught.value.rule) == (errno.EINVAL, "create.flags")


def test_the_rest_of_create(bench: Bench) -> None:
    """Rows N23 to N25, N34 to N36: reserved words, bad pointers, and the order against a full descriptor table."""
    reserved = CreateGuestMemfd(K, 0, (1, 2, 3, 4, 5, 6)).pack()
    assert int(ask(bench.host, bench.vm.fd, uapi.KVM_CREATE_GUEST_MEMFD, reserved)[0]) > 0
    for pointer in (0, 1):
        with pytest.raises(Refusal) as caught:
            bench.run(ioctl(bench.host.process, bench.vm.fd, uapi.KVM_CREATE_GUEST_MEMFD, pointer))
        assert (caught.value.errno, caught.value.rule) == (errno.EFAULT, "user.copy")
    full = FdTable(limit=0)
    for alleged, expected in (
        (CreateGuestMemfd(K, 0), (errno.EMFILE, "fd.limit")),
        (CreateGuestMemfd(K, 8), (errno.EINVAL, "create.flags")),
        (CreateGuestMemfd(1, 0), (errno.EINVAL, "create.size")),
    ):
        with pytest.raises(Refusal) as caught:
            bench.run(create_guest_memfd(bench.vm.kvm, full, alleged))
        assert (caught.value.errno, caught.value.rule) == expected


def test_a_failed_allocation_gives_the_descriptor_back() -> None:
    outcomes: set[str] = set()

    def scenario(policy: Follow) -> None:
        bench = Bench(policy=policy)
        open_before = bench.host.process.fds.open_fds()
        try:
            bench.vm.create_guest_memfd(K)
            outcomes.add("made")
        except Refusal as refusal:
            assert (refusal.errno, refusal.rule) == (errno.ENOMEM, "create.nomem")
            assert bench.host.process.fds.open_fds() == open_before
            outcomes.add("refused")
        bench.close()

    every_schedule(scenario, failures=1)
    assert outcomes == {"made", "refused"}


@pytest.mark.parametrize(
    ("level", "vm_type", "expected"),
    [
        ("v6.12", VmType.DEFAULT, 0),
        ("v6.12", VmType.SW_PROTECTED, 0),
        ("v6.18", VmType.DEFAULT, 3),
        ("v6.18", VmType.SW_PROTECTED, 1),
        ("v7.3", VmType.SW_PROTECTED, 1),
        ("v7.4", VmType.SW_PROTECTED, 3),
        ("future", VmType.DEFAULT, 7),
    ],
)
def test_legal_flags_by_level_and_type(level: str, vm_type: VmType, expected: int) -> None:
    """uapi.md section 6; golden row C13."""
    with Host(level=LEVELS[level]) as host:
        assert supported_flags(host.create_vm(vm_type).kvm) == expected


def test_what_users_may_do_is_decided_at_creation_and_carried_by_the_inode() -> None:
    """R14: the same core calls, two instances, different answers; no VM type in the core."""
    with Host() as host:
        plain = host.create_vm(VmType.DEFAULT).create_guest_memfd(K, mmap=True, init_shared=True)
        protected = host.create_vm(VmType.SW_PROTECTED).create_guest_memfd(K)
        assert plain.inode.abilities.mmap
        assert not plain.inode.abilities.convertible
        assert not protected.inode.abilities.mmap
        assert protected.inode.abilities.convertible


# Attributes


def refused(gmem: Gmem, **fields: object) -> tuple[int | None, str]:
    alleged = MemoryAttributes2(**{"offset": 0, "size": K, "attributes": PRIVATE} | fields)  # type: ignore[arg-type]
    with pytest.raises(Refusal) as caught:
        gmem.host.run(set_memory_attributes2(gmem.file, alleged))
    return caught.value.errno, caught.value.rule


WORST: dict[str, dict[str, object]] = {
    "flags": {"flags": 1},
    "reserved": {"reserved": (0,) * 10 + (1,)},
    "attributes": {"attributes": PRIVATE | 1},
    "range": {"offset": 1, "size": 2**64 - 1},
    "unaligned": {"offset": 1, "size": K},
    "past_end": {"offset": 8 * K, "size": K},
}


@pytest.mark.parametrize("rule", WORST)
def test_attributes2_refuses_each_misuse_by_its_rule(bench: Bench, rule: str) -> None:
    gmem = bench.gmem()
    assert refused(gmem, **WORST[rule]) == (errno.EINVAL, f"attributes2.{rule}")
    assert gmem.accesses() == [(0, 8 * K, Access.SHARED)]


def test_attributes2_checks_in_the_order_of_the_specification(bench: Bench) -> None:
    """Each misuse together with all later ones: the earlier rule answers (uapi.md 13.2)."""
    gmem = bench.gmem()
    rules = list(WORST)
    for place, rule in enumerate(rules):
        fields: dict[str, object] = {}
        for later in reversed(rules[place:]):
            fields |= WORST[later]
        assert refused(gmem, **fields) == (errno.EINVAL, f"attributes2.{rule}")


@pytest.mark.parametrize(
    ("offset", "size", "rule"),
    [
        (0, 0, "range"),
        (2**64 - K, K, "range"),
        (2**64 - K, 2 * K, "range"),
        (0, 100, "unaligned"),
        (7 * K, 2 * K, "past_end"),
        (2**63, K, "past_end"),
    ],
)
def test_absurd_ranges(bench: Bench, offset: int, size: int, rule: str) -> None:
    assert refused(bench.gmem(), offset=offset, size=size) == (errno.EINVAL, f"attributes2.{rule}")


def test_a_vm_without_private_memory_cannot_convert() -> None:
    bench = Bench(vm_type=VmType.DEFAULT)
    gmem = bench.gmem()
    assert refused(gmem) == (errno.EINVAL, "attributes2.no_private_memory")
    assert refused(gmem, attributes=1) == (errno.EINVAL, "attributes2.no_private_memory")
    assert refused(gmem, flags=1) == (errno.EINVAL, "attributes2.flags")
    bench.close()


def test_a_kernel_without_conversion_has_no_such_ioctl() -> None:
    """Rows K5, K6."""
    with Host(level=LEVELS["v6.18"]) as host:
        gmem = host.create_vm(VmType.DEFAULT).create_guest_memfd(K, mmap=True, init_shared=True)
        data = MemoryAttributes2(0, K, PRIVATE).pack()
        assert ask(host, gmem.fd, uapi.KVM_SET_MEMORY_ATTRIBUTES2, data)[0] == "ENOTTY"
        assert ask(host, gmem.fd, uapi.KVM_SET_MEMORY_ATTRIBUTES2, None)[0] == "ENOTTY", "before the copy"
        assert ask(host, gmem.fd, uapi.KVM_SET_MEMORY_ATTRIBUTES, data[:32])[0] == "ENOTTY"


def test_error_offset_comes_back_only_where_the_posting_writes_it(bench: Bench) -> None:
    """uapi.md 13.2: EAGAIN tells the first busy page, EINVAL leaves the word alone, success too."""
    gmem = bench.gmem()
    view = gmem.mmap()
    pin = gmem.pin(view, 5 * K, 1)
    marked = MemoryAttributes2(2 * K, 6 * K, PRIVATE, error_offset=0xABCD)
    answer, after = ask(bench.host, gmem.fd, uapi.KVM_SET_MEMORY_ATTRIBUTES2, marked.pack())
    assert answer == "EAGAIN"
    assert struct.unpack_from("<Q", after, 32) == (5 * K,)
    pin.unpin()
    for alleged, expected in (
        (MemoryAttributes2(1, K, PRIVATE, error_offset=0xABCD), "EINVAL"),
        (MemoryAttributes2(0, 8 * K, PRIVATE, error_offset=0xABCD), "0"),
    ):
        answer, after = ask(bench.host, gmem.fd, uapi.KVM_SET_MEMORY_ATTRIBUTES2, alleged.pack())
        assert (answer, after) == (expected, alleged.pack())


def test_a_result_that_cannot_be_written_is_efault_instead(bench: Bench) -> None:
    """uapi.md 13.2 row 11."""
    gmem = bench.gmem()
    view = gmem.mmap()
    pin = gmem.pin(view, 0, 1)
    argument = bench.gmem(pages=1, gpa=None)
    writable = argument.mmap()
    writable.write(0, MemoryAttributes2(0, K, PRIVATE).pack())
    read_only = bench.run(bench.host.process.mmap(argument.fd, K, prot=1))
    with pytest.raises(Refusal) as caught:
        bench.run(ioctl(bench.host.process, gmem.fd, uapi.KVM_SET_MEMORY_ATTRIBUTES2, read_only))
    assert (caught.value.errno, caught.value.rule) == (errno.EFAULT, "user.copy")
    pin.unpin()


def test_conversion_needs_no_memslot_and_no_open_vm(bench: Bench) -> None:
    """uapi.md 13.2: state belongs to the memory, not to the VM."""
    gmem = bench.gmem(gpa=None)
    bench.vm.close()
    gmem.convert(0, 8 * K, Access.PRIVATE)
    assert gmem.accesses() == [(0, 8 * K, Access.PRIVATE)]


def test_a_file_is_the_view_of_one_vm(bench: Bench) -> None:
    gmem = bench.gmem(gpa=None)
    other: Vm = bench.host.create_vm(VmType.SW_PROTECTED)
    assert gmem.bound_to(bench.vm)
    assert not gmem.bound_to(other)
    with pytest.raises(Refusal) as caught:
        other.set_memory_region(0, 0, 8 * K, gmem=gmem)
    assert (caught.value.errno, caught.value.rule) == (errno.EINVAL, "bind.other_vm")
