"""KVM_SET_USER_MEMORY_REGION2: the checks of uapi.md section 7 as Linux 6.18 made them, and what a slot's life does.

Rows are those of golden_6_18.md, section R: one VM, a 2 MiB file, in the order in which they were observed.
"""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Iterator

import pytest

from guestmem.cpu.scripted import Load, Store
from guestmem.host import Host
from guestmem.kvm.exits import HltExit
from guestmem.kvm.ioctl import ioctl
from guestmem.memory import PAGE_SIZE, Access
from guestmem.trace import Refusal, errno_name
from guestmem.uapi.kvm import KVM_SET_USER_MEMORY_REGION, KVM_SET_USER_MEMORY_REGION2, VmType
from guestmem.uapi.levels import LEVELS
from guestmem.uapi.structs import UserspaceMemoryRegion
from guestmem.uapi.structs import UserspaceMemoryRegion2 as Region2
from tests.kvm.conftest import Bench

K = PAGE_SIZE
M = 1 << 20
GMEM, LOG_DIRTY, READONLY = 4, 1, 2
BIG = 0x7FFF_FFFF_FFFF_F000


class Kernel618:
    """A VM at level v6.18 that is asked through the ioctl, as the probe programs asked."""

    def __init__(self) -> None:
        self.host = Host(level=LEVELS["v6.18"])
        self.vm = self.host.create_vm(VmType.DEFAULT)
        self.gmem = self.file(2 * M)
        self.scratch = self.host.anonymous(K)

    def file(self, size: int) -> int:
        return self.vm.create_guest_memfd(size, mmap=True, init_shared=True).fd

    def region(self, **fields: int) -> str:
        """The answer, "0" or an errno name, to a region that is valid but for `fields`. Default: slot 0, 1 MiB."""
        values = {
            "slot": 0,
            "flags": GMEM,
            "guest_phys_addr": 0,
            "memory_size": M,
            "guest_memfd": self.gmem,
        } | fields
        return self.ask(KVM_SET_USER_MEMORY_REGION2, Region2(**values).pack())  # type: ignore[arg-type]

    def delete(self, slot: int, **fields: int) -> str:
        return self.region(slot=slot, memory_size=0, **{"flags": 0} | fields)

    def region_v1(self, **fields: int) -> str:
        values = {"slot": 0, "flags": 0, "guest_phys_addr": 0, "memory_size": M, "userspace_addr": 0} | fields
        return self.ask(KVM_SET_USER_MEMORY_REGION, UserspaceMemoryRegion(**values).pack())

    def ask(self, request: int, data: bytes | None) -> str:
        argument = 0
        if data is not None:
            self.scratch.write(0, data)
            argument = self.scratch.hva
        try:
            return str(self.host.run(ioctl(self.host.process, self.vm.fd, request, argument)))
        except Refusal as refusal:
            return errno_name(refusal.errno)


@pytest.fixture
def kernel() -> Iterator[Kernel618]:
    made = Kernel618()
    yield made
    made.host.check()
    made.host.close()


REFUSED = [
    ("R1", {"slot": 32764}, "EINVAL"),
    ("R2", {"slot": 0x10000}, "EINVAL"),
    ("R5", {"flags": GMEM | LOG_DIRTY}, "EINVAL"),
    ("R6", {"flags": GMEM | READONLY}, "EINVAL"),
    ("R7", {"flags": GMEM | 8}, "EINVAL"),
    ("R8", {"flags": GMEM | 1 << 16}, "EINVAL"),
    ("R9", {"flags": GMEM | LOG_DIRTY, "guest_memfd": -1}, "EINVAL"),
    ("R10", {"memory_size": 4097}, "EINVAL"),
    ("R11", {"memory_size": 100}, "EINVAL"),
    ("R12", {"guest_phys_addr": 100}, "EINVAL"),
    ("R13", {"guest_phys_addr": 100, "guest_memfd": -1}, "EINVAL"),
    ("R14", {"userspace_addr": 100}, "EINVAL"),
    ("R15", {"userspace_addr": 0xFFFF_8000_0000_0000}, "EINVAL"),
    ("R16", {"userspace_addr": 1 << 48}, "EINVAL"),
    ("R17", {"userspace_addr": 100, "guest_memfd": -1}, "EINVAL"),
    ("R20", {"guest_memfd_offset": 100}, "EINVAL"),
    ("R21", {"guest_memfd_offset": 100, "guest_memfd": -1}, "EINVAL"),
    ("R22", {"guest_memfd_offset": 2**64 - K, "memory_size": 2 * K}, "EINVAL"),
    ("R23", {"guest_memfd_offset": 2**64 - K, "memory_size": 2 * K, "guest_memfd": -1}, "EINVAL"),
    ("R24", {"guest_memfd_offset": 2**64 - K, "memory_size": K, "guest_memfd": -1}, "EINVAL"),
    ("R25", {"guest_memfd_offset": 1 << 63}, "EINVAL"),
    ("R26", {"guest_memfd_offset": BIG - K, "memory_size": K}, "EINVAL"),
    ("R30", {"guest_memfd_offset": 1 << 63, "memory_size": K}, "EINVAL"),
    ("R31", {"guest_memfd_offset": 1 << 62, "memory_size": K}, "EINVAL"),
    ("R32", {"guest_phys_addr": 1 << 52, "guest_memfd": -1}, "EBADF"),
    ("R33", {"guest_phys_addr": 1 << 52}, "EINVAL"),
    ("R37", {"memory_size": (8 << 40) - K, "guest_memfd": -1}, "EBADF"),
    ("R38", {"memory_size": 8 << 40, "guest_memfd": -1}, "EINVAL"),
    ("R39", {"guest_phys_addr": 2**64 - K, "memory_size": 2 * K, "guest_memfd": -1}, "EINVAL"),
    ("R40", {"guest_phys_addr": 2**64 - K, "memory_size": K, "guest_memfd": -1}, "EINVAL"),
    ("R41", {"guest_memfd_offset": 1 << 63, "guest_memfd": -1}, "EBADF"),
    ("R49", {"slot": 9, "memory_size": 0, "flags": 0}, "EINVAL"),
    ("R50", {"slot": 9, "memory_size": 0}, "EINVAL"),
    ("R51", {"guest_memfd": -1}, "EBADF"),
    ("R52", {"guest_memfd": 999}, "EBADF"),
    ("R60", {"guest_memfd_offset": M + K}, "EINVAL"),
    ("R61", {"guest_memfd_offset": 2 * M}, "EINVAL"),
    ("R62", {"guest_memfd_offset": 2 * M, "guest_memfd": -1}, "EBADF"),
]


@pytest.mark.parametrize(("row", "fields", "expected"), REFUSED, ids=[row[0] for row in REFUSED])
def test_refused_as_by_linux_6_18(kernel: Kernel618, row: str, fields: dict[str, int], expected: str) -> None:
    assert kernel.region(**fields) == expected
    assert not kernel.vm.kvm.memslots.by_id, "nothing half done"
    assert kernel.region() == "0", "and the same file range can still be bound (row R34)"


ACCEPTED = [
    ("R3", {"slot": 32763}),
    ("R18", {"userspace_addr": 0}),
    ("R19", {"userspace_addr": 0x10000}),
    ("R27", {"guest_memfd_offset": BIG, "memory_size": K}),
    ("R28", {"guest_memfd_offset": BIG - K, "memory_size": 2 * K}),
    ("R29", {"guest_memfd_offset": BIG, "memory_size": M}),
    ("R35", {"guest_phys_addr": 1 << 46}),
    ("R36", {"guest_phys_addr": 1 << 51}),
]


@pytest.mark.parametrize(("row", "fields"), ACCEPTED, ids=[row[0] for row in ACCEPTED])
def test_accepted_as_by_linux_6_18(kernel: Kernel618, row: str, fields: dict[str, int]) -> None:
    assert kernel.region(**fields) == "0"
    assert kernel.delete(fields.get("slot", 0)) == "0"


def test_reserved_words_are_not_looked_at(kernel: Kernel618) -> None:
    """Row R63."""
    region = Region2(0, GMEM, 0, M, guest_memfd=kernel.gmem)
    data = dataclasses.replace(region, reserved=(0xFFFF_FFFF, *range(1, 15))).pack()
    assert kernel.ask(KVM_SET_USER_MEMORY_REGION2, data) == "0"


def test_descriptors_of_the_wrong_kind(kernel: Kernel618) -> None:
    """Rows R54, R58, R59, R64, R102."""
    assert kernel.region(guest_memfd=kernel.vm.fd) == "EINVAL"
    stranger = kernel.host.create_vm(VmType.DEFAULT)
    foreign = stranger.create_guest_memfd(2 * M, mmap=True, init_shared=True).fd
    assert kernel.region(guest_memfd=foreign) == "EINVAL"
    assert kernel.region(guest_memfd=foreign, guest_memfd_offset=2 * M) == "EINVAL"
    stranger.close()
    assert kernel.region(guest_memfd=foreign) == "EINVAL"
    assert kernel.ask(KVM_SET_USER_MEMORY_REGION2, None) == "EFAULT"


def test_the_largest_slot_of_the_largest_file(kernel: Kernel618) -> None:
    """Row R42."""
    assert kernel.region(guest_memfd=kernel.file(16 << 40), memory_size=(8 << 40) - K) == "0"


def test_duplicated_descriptors_are_one_file(kernel: Kernel618) -> None:
    """Rows R43 to R45."""
    twin = kernel.host.process.fds.dup(kernel.gmem)
    assert kernel.region(guest_memfd=twin) == "0"
    assert kernel.region(slot=1, guest_phys_addr=4 * M) == "EINVAL"
    kernel.host.run(kernel.host.process.fds.close(twin))
    assert kernel.region(slot=1, guest_phys_addr=4 * M, guest_memfd_offset=M) == "0"


def test_the_v1_ioctl(kernel: Kernel618) -> None:
    """Rows R46 to R48, R65."""
    assert kernel.region_v1(slot=5, guest_phys_addr=64 * M) == "0"
    assert kernel.delete(5) == "0"
    assert kernel.region() == "0"
    assert kernel.region_v1() == "EINVAL"
    assert kernel.region_v1(memory_size=0) == "0"
    assert kernel.region_v1(flags=GMEM) == "EINVAL"


def test_one_slots_life_as_linux_6_18_told_it(kernel: Kernel618) -> None:
    """Rows R66 to R97, in their order."""
    other = kernel.file(2 * M)
    assert kernel.region() == "0"  # R66
    assert kernel.region() == "EINVAL"  # R67
    assert kernel.region(guest_memfd=-1) == "EINVAL"  # R68
    assert kernel.region(guest_phys_addr=4 * M) == "EINVAL"  # R69
    assert kernel.region(memory_size=M // 2) == "EINVAL"  # R70
    assert kernel.region(guest_memfd_offset=M) == "EINVAL"  # R71
    assert kernel.region(userspace_addr=0x10000) == "EINVAL"  # R72
    assert kernel.region(slot=1, guest_phys_addr=4 * M) == "EINVAL"  # R73
    assert kernel.region(slot=1, guest_phys_addr=4 * M, guest_memfd_offset=M - K) == "EINVAL"  # R74
    assert kernel.region(slot=1, guest_phys_addr=4 * M, guest_memfd_offset=M) == "0"  # R75
    overlapping = {"slot": 2, "guest_phys_addr": M - K, "guest_memfd": other}
    assert kernel.region(**overlapping) == "EEXIST"  # R76
    assert kernel.region(**overlapping | {"guest_memfd": -1}) == "EEXIST"  # R77
    assert kernel.region(**overlapping, guest_memfd_offset=100) == "EINVAL"  # R78
    assert kernel.region(**overlapping, guest_memfd_offset=2 * M) == "EEXIST"  # R79
    assert kernel.region(**overlapping, flags=0) == "EEXIST"  # R80
    assert kernel.region(**overlapping, flags=GMEM | READONLY) == "EINVAL"  # R81
    assert kernel.region(slot=2, guest_phys_addr=M, guest_memfd=other) == "0"  # R82
    assert kernel.delete(0) == "0"  # R84
    assert kernel.delete(0) == "EINVAL"  # R85
    assert kernel.region(slot=3, guest_phys_addr=8 * M) == "0"  # R86
    assert kernel.delete(3, flags=GMEM) == "0"  # R87
    assert kernel.delete(1, guest_phys_addr=99 * M, guest_memfd=-1) == "0"  # R88
    plain = {"slot": 7, "flags": 0, "guest_phys_addr": 128 * M, "userspace_addr": 0x10000}
    assert kernel.region(**plain) == "0"  # R89
    assert kernel.region(**plain | {"flags": GMEM}) == "EINVAL"  # R90
    assert kernel.region(**plain) == "0"  # R91
    assert kernel.region(**plain | {"slot": 8, "guest_phys_addr": 256 * M}, guest_memfd_offset=100) == "0"  # R92
    assert kernel.region(slot=2, guest_phys_addr=M, flags=0) == "EINVAL"  # R93
    assert kernel.region(slot=2, guest_phys_addr=M, flags=LOG_DIRTY) == "EINVAL"  # R94
    kernel.host.run(kernel.host.process.fds.close(other))
    assert kernel.region(slot=2, guest_phys_addr=M) == "EINVAL"  # R95
    assert kernel.delete(2) == "0"  # R96
    assert kernel.region(slot=2, guest_phys_addr=M) == "0"  # R97


def test_an_overlapping_bind_is_eexist_from_7_2_and_a_wild_end_is_caught() -> None:
    bench = Bench(level=LEVELS["v7.3"], vm_type=VmType.DEFAULT)
    gmem = bench.gmem()
    for offset, expected in (
        (0, (errno.EEXIST, "bind.overlap")),
        (BIG, (errno.EINVAL, "bind.past_end")),
    ):
        with pytest.raises(Refusal) as caught:
            bench.vm.set_memory_region(1, 1 << 30, K, gmem=gmem, offset=offset)
        assert (caught.value.errno, caught.value.rule) == expected
    bench.close()


def test_a_vm_without_private_memory_has_guest_memfd_slots_only_since_they_are_mappable() -> None:
    """Known bug B67. Linux 6.12 asked kvm_arch_has_private_mem(), 6.18 kvm_arch_supports_gmem()."""
    for level, expected in (("v6.12", "region.flags"), ("v6.18", None)):
        bench = Bench(level=LEVELS[level], vm_type=VmType.DEFAULT)
        gmem = bench.gmem(mmap=False, init_shared=False, gpa=None)
        if expected is None:
            bench.vm.set_memory_region(0, 0, 8 * K, gmem=gmem)
        else:
            with pytest.raises(Refusal) as caught:
                bench.vm.set_memory_region(0, 0, 8 * K, gmem=gmem)
            assert (caught.value.errno, caught.value.rule) == (errno.EINVAL, expected)
        bench.close()


def test_a_plain_slot_can_move_and_change_its_logging_but_not_its_size(bench: Bench) -> None:
    memory = bench.host.anonymous(4 * K)
    memory[0] = 0x55
    bench.vm.set_memory_region(1, 0, 4 * K, memory=memory)
    assert bench.guest(Load(0)) == (HltExit(), [0x55])
    bench.vm.set_memory_region(1, 0, 4 * K, memory=memory, flags=LOG_DIRTY)
    bench.vm.set_memory_region(1, 16 * K, 4 * K, memory=memory, flags=LOG_DIRTY)
    assert bench.guest(Load(16 * K), Load(0)) == (HltExit(), [0x55, 0xFF]), "nothing is left at the old address"
    for change, rule in (
        ({"size": 2 * K}, "region.resized"),
        ({"flags": READONLY}, "region.fixed_flags"),
    ):
        with pytest.raises(Refusal) as caught:
            bench.vm.set_memory_region(1, 16 * K, **{"size": 4 * K, "memory": memory, "flags": LOG_DIRTY} | change)  # type: ignore[arg-type]
        assert (caught.value.errno, caught.value.rule) == (errno.EINVAL, rule)


def test_a_moved_slot_must_not_land_on_another(bench: Bench) -> None:
    memory = bench.host.anonymous(2 * K)
    bench.vm.set_memory_region(1, 0, K, memory=memory)
    bench.vm.set_memory_region(2, 4 * K, K, memory=memory)
    with pytest.raises(Refusal) as caught:
        bench.vm.set_memory_region(1, 4 * K, K, memory=memory)
    assert caught.value.rule == "region.overlap"
    assert bench.vm.kvm.memslots.by_id[1].gfns.start == 0


def test_deleting_and_rebinding_keeps_bytes_and_access(bench: Bench) -> None:
    """semantics.md section 5; golden rows G8, G9."""
    gmem = bench.gmem()
    bench.guest(Store(2 * K, 0x22))
    gmem.convert(2 * K, K, Access.PRIVATE)
    bench.vm.set_memory_region(0, 0, 0)
    assert not bench.vm.kvm.stage2.tables[Access.SHARED]
    bench.vm.set_memory_region(4, 1 << 30, 8 * K, gmem=gmem)
    assert bench.guest(Load((1 << 30) + 2 * K)) == (HltExit(), [0x22])
    assert gmem.accesses()[1] == (2 * K, K, Access.PRIVATE)


def test_a_failed_arch_check_undoes_the_binding(bench: Bench) -> None:
    gmem = bench.gmem(gpa=None)
    with pytest.raises(Refusal) as caught:
        bench.vm.set_memory_region(0, 1 << 52, 8 * K, gmem=gmem)
    assert caught.value.rule == "region.unreachable"
    bench.vm.set_memory_region(0, 0, 8 * K, gmem=gmem)


@pytest.mark.parametrize(
    ("vm_type", "gpa", "rule"),
    [
        (VmType.TDX, 1 << 47, "region.alias"),
        (VmType.TDX, (1 << 47) - K, "region.alias"),  # the last of two frames
        (VmType.TDX, (1 << 47) - 2 * K, None),
        (VmType.TDX, 1 << 48, None),  # a kernel asks about one bit
        (VmType.SNP, 1 << 51, None),
        (VmType.SW_PROTECTED, 1 << 47, None),
    ],
)
def test_frames_that_are_others_by_the_shared_bit(vm_type: VmType, gpa: int, rule: str | None) -> None:
    """Source: kvm_arch_prepare_memory_region, kvm_is_gfn_alias() of the last frame; gfn_direct_bits is a TD's alone."""
    with Host(memory=16 * K) as host:
        vm = host.create_vm(vm_type)
        gmem = vm.create_guest_memfd(2 * K)
        if rule is None:
            vm.set_memory_region(0, gpa, 2 * K, gmem=gmem)
            return
        with pytest.raises(Refusal) as caught:
            vm.set_memory_region(0, gpa, 2 * K, gmem=gmem)
        assert (caught.value.errno, caught.value.rule) == (errno.EINVAL, rule)


def test_many_slots_of_one_file(bench: Bench) -> None:
    gmem = bench.gmem(pages=8, gpa=None)
    for page in range(8):
        bench.vm.set_memory_region(page, (7 - page) * 16 * K, K, gmem=gmem, offset=page * K)
    view = gmem.mmap()
    for page in range(8):
        view[page * K] = page
    assert bench.guest(*(Load((7 - page) * 16 * K) for page in range(8))) == (HltExit(), list(range(8)))
    gmem.convert(2 * K, 3 * K, Access.PRIVATE)
    assert len(bench.vm.kvm.stage2.tables[Access.SHARED]) == 5
    gmem.convert(2 * K, 3 * K, Access.SHARED)
