"""KVM Userfault: a guest that is restored lazily, and what a slot with a bitmap may and may not do."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from guestmem.cpu.scripted import Load, Store
from guestmem.kvm.exits import HltExit, MemoryFaultExit
from guestmem.serve.capabilities import check_extension
from guestmem.trace import Refusal
from guestmem.uapi.kvm import KVM_MEM_GUEST_MEMFD, VmType
from guestmem.uapi.levels import LEVELS, read_level
from guestmem.userspace.view import View
from tests.kvm.conftest import Bench, K

SNAPSHOT = bytes(range(0x40, 0x48))


def bitmap_of(bench: Bench, bits: int) -> View:
    view = bench.host.anonymous(K)
    view.write(0, bits.to_bytes(8, "little"))
    return view


def test_a_guest_is_restored_page_by_page_as_it_touches_them() -> None:
    bench = Bench(vm_type=VmType.DEFAULT)
    gmem, missing = bench.gmem(gpa=None), bitmap_of(bench, 0xFF)
    bench.vm.set_memory_region(0, 0, 8 * K, gmem=gmem, userfault_bitmap=missing)
    memory = gmem.mmap()
    vcpu = bench.vcpu(*(Load(page * K) for page in (5, 0, 7, 5)))
    brought = []
    while isinstance(exit_ := vcpu.run(), MemoryFaultExit):
        assert (exit_.userfault, exit_.refusal.errno, exit_.size) == (True, errno.EFAULT, K)
        page = exit_.gpa // K
        memory[page * K] = SNAPSHOT[page]
        missing.write(0, (int.from_bytes(missing.read(0, 8), "little") & ~(1 << page)).to_bytes(8, "little"))
        brought.append(page)
    assert exit_ == HltExit()
    assert vcpu.engine.loaded == [SNAPSHOT[page] for page in (5, 0, 7, 5)]  # type: ignore[attr-defined]
    assert brought == [5, 0, 7], "each once, and no other"
    assert gmem.statistics().allocated == 3
    bench.close()


def test_turned_on_late_it_takes_mappings_away_and_turned_off_it_leaves_them() -> None:
    bench = Bench(vm_type=VmType.DEFAULT)
    gmem = bench.gmem()
    assert bench.guest(Store(0, 7), Load(0)) == (HltExit(), [7])
    bench.vm.set_memory_region(0, 0, 8 * K, gmem=gmem, userfault_bitmap=bitmap_of(bench, 1))
    exit_, _ = bench.guest(Load(0))
    assert isinstance(exit_, MemoryFaultExit) and exit_.userfault
    assert bench.guest(Load(K)) == (HltExit(), [0]), "whose bit is clear is as before"
    bench.vm.set_memory_region(0, 0, 8 * K, gmem=gmem)
    assert bench.guest(Load(0)) == (HltExit(), [7])
    bench.vm.set_memory_region(0, 0, 0)
    bench.close()


def test_a_plain_slot_may_have_it_and_keep_its_log() -> None:
    bench = Bench(vm_type=VmType.DEFAULT)
    memory = bench.host.anonymous(4 * K)
    bench.vm.set_memory_region(0, 0, 4 * K, memory=memory, userfault_bitmap=bitmap_of(bench, 0b10))
    assert bench.guest(Store(0, 1)) == (HltExit(), [])
    exit_, _ = bench.guest(Load(K))
    assert isinstance(exit_, MemoryFaultExit) and exit_.userfault
    bench.close()


def test_the_access_is_looked_at_first() -> None:
    """A page of the wrong kind is a conversion first; whoever brings it knows then what to bring."""
    bench = Bench()
    gmem = bench.gmem(gpa=None)
    bench.vm.set_memory_region(0, 0, 8 * K, gmem=gmem, userfault_bitmap=bitmap_of(bench, 1))
    exit_, _ = bench.guest(Load(0, private=True))
    assert isinstance(exit_, MemoryFaultExit)
    assert (exit_.refusal.rule, exit_.userfault) == ("fault.mismatch", False)
    bench.close()


def test_a_bitmap_that_cannot_be_read_or_be_there() -> None:
    bench = Bench(vm_type=VmType.DEFAULT)
    gmem, gone = bench.gmem(gpa=None), bitmap_of(bench, 0)
    bench.vm.set_memory_region(0, 0, 8 * K, gmem=gmem, userfault_bitmap=gone)
    bench.run(bench.host.process.mm.unmap(gone.hva, K))
    exit_, _ = bench.guest(Load(0))
    assert isinstance(exit_, MemoryFaultExit)
    assert (exit_.refusal.errno, exit_.userfault) == (errno.EFAULT, False)
    bench.close()


def test_only_userfault_of_a_guest_memfd_slot_can_change() -> None:
    bench = Bench(vm_type=VmType.DEFAULT)
    gmem, bits = bench.gmem(), bitmap_of(bench, 0)
    for gpa, size, bitmap in ((K, 8 * K, bits), (0, 4 * K, bits), (0, 8 * K, None)):
        with pytest.raises(Refusal, match=r"region\.gmem_immutable"):
            bench.vm.set_memory_region(0, gpa, size, gmem=gmem, userfault_bitmap=bitmap)
    bench.close()


@pytest.mark.parametrize("level", [name for name in LEVELS if name != "future"])
def test_no_kernel_that_is_released_has_it(level: str) -> None:
    bench = Bench(level=LEVELS[level])
    gmem = bench.gmem(mmap=False, init_shared=False, gpa=None)
    with pytest.raises(Refusal) as caught:
        bench.vm.set_memory_region(0, 0, 8 * K, gmem=gmem, userfault_bitmap=bitmap_of(bench, 0))
    assert (caught.value.errno, caught.value.rule) == (errno.EINVAL, "region.flags")
    bench.close()


def test_a_fork_has_its_own_bit_and_number(tmp_path: Path) -> None:
    """Firecracker's kernel: KVM_CAP_USERFAULT is 245."""
    path = tmp_path / "firecracker.toml"
    path.write_text(
        'base = "v7.3"\n[flags.memory_region]\nUSERFAULT = 5\n'
        "[capabilities]\nARM_SEA_TO_USER = false\nUSERFAULT = 245\n"
    )
    bench = Bench(level=read_level(path), vm_type=VmType.DEFAULT)
    assert check_extension(bench.host.level, bench.vm.kvm, 245) == 1
    gmem = bench.gmem(gpa=None)
    with pytest.raises(Refusal, match=r"region\.flags"):
        bench.vm.set_memory_region(0, 0, 8 * K, gmem=gmem, flags=1 << 3)
    bench.vm.set_memory_region(0, 0, 8 * K, gmem=gmem, userfault_bitmap=bitmap_of(bench, 1))
    assert bench.vm.kvm.memslots.by_id[0].flags & KVM_MEM_GUEST_MEMFD
    exit_, _ = bench.guest(Load(0))
    assert isinstance(exit_, MemoryFaultExit) and exit_.userfault
    bench.close()
