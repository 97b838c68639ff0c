"""Host mappings of a guest_memfd: faults, signals, sharing, fork. Golden rows M, T, S, V of spec/golden_6_18.md."""

from __future__ import annotations

import errno

import pytest

from guestmem.memory import PAGE_SIZE, Access, PageIndex
from guestmem.trace import Refusal
from guestmem.trace import events as event
from guestmem.userspace import BUS_ADRERR, BUS_MCEERR_AR, SigBus, SigSegv
from tests.userspace.conftest import Machine

K = PAGE_SIZE


def test_a_shared_page_reads_zero_and_keeps_what_is_written(machine: Machine) -> None:
    assert machine.view[0:K] == bytes(K)
    machine.view[K - 2 : K + 3] = b"cross"
    assert machine.view[K - 2 : K + 3] == b"cross"
    assert machine.view[K - 2] == ord("c")
    assert machine.gmem.statistics().allocated == 2


def test_a_touch_maps_one_page_no_more(machine: Machine) -> None:
    """No fault-around: row I16."""
    machine.view[3 * K]
    assert len(machine.host.process.mm.page_table) == 1


def test_two_mappings_of_a_file_are_one_memory(machine: Machine) -> None:
    other = machine.gmem.mmap()
    machine.view[10:15] = b"hello"
    assert other[10:15] == b"hello"


def test_a_private_page_is_sigbus_at_the_exact_address(machine: Machine) -> None:
    """Rows T1, T2: si_code 2, si_addr of the touch itself."""
    machine.view[K : K + 5] = b"bytes"
    machine.gmem.convert(K, K, Access.PRIVATE)
    for touch in (lambda: machine.view[K + 0x123], lambda: machine.view.write(K + 0x123, b"x")):
        with pytest.raises(SigBus) as caught:
            touch()
        assert (caught.value.hva, caught.value.code) == (machine.view.hva + K + 0x123, BUS_ADRERR)
        assert caught.value.reason.rule == "fault.access"
    assert machine.view[0] == 0, "the neighbour is untouched"
    machine.gmem.convert(K, K, Access.SHARED)
    assert machine.view[K : K + 5] == b"bytes"


def test_a_system_call_on_a_private_page_is_efault(machine: Machine) -> None:
    """Rows T4 to T13."""
    machine.gmem.convert(0, K, Access.PRIVATE)
    mm = machine.host.process.mm
    for call in (mm.copy_from_user(machine.view.hva, 8), mm.copy_to_user(machine.view.hva, b"x")):
        with pytest.raises(Refusal) as caught:
            machine.host.run(call)
        assert (caught.value.errno, caught.value.rule) == (errno.EFAULT, "user.copy")


def test_a_write_across_into_a_private_page_stores_what_came_before(machine: Machine) -> None:
    machine.gmem.convert(K, K, Access.PRIVATE)
    with pytest.raises(SigBus):
        machine.view.write(K - 2, b"abcd")
    assert machine.view[K - 2 : K] == b"ab"


def test_past_the_end_is_sigbus(machine: Machine) -> None:
    """Rows M24 to M29: mapping beyond the end is allowed, touching is not."""
    longer = machine.gmem.mmap(size=16 * K)
    assert longer[8 * K - 1] == 0
    with pytest.raises(SigBus) as caught:
        longer[8 * K]
    assert (caught.value.hva, caught.value.code) == (longer.hva + 8 * K, BUS_ADRERR)
    assert caught.value.reason.rule == "fault.past_end"
    beyond = machine.gmem.mmap(offset=32 * K, size=K)
    with pytest.raises(SigBus):
        beyond[0]


def test_poison_is_sigbus_with_the_code_of_a_memory_error(machine: Machine) -> None:
    machine.view[0] = 1
    machine.host.run(machine.gmem.inode.memory_failure(PageIndex(0)))
    with pytest.raises(SigBus) as caught:
        machine.view[0]
    assert caught.value.code == BUS_MCEERR_AR
    machine.gmem.punch_hole(0, K)
    assert machine.view[0] == 0


@pytest.mark.parametrize(
    ("size", "offset", "prot", "shared", "expected"),
    [
        (0, 0, 3, True, ("EINVAL", "mmap.range")),  # M31
        (K, 100, 3, True, ("EINVAL", "mmap.offset")),  # M30
        (K, 0, 5, True, ("EPERM", "mmap.exec")),  # M8
        (K, 0, 3, False, ("EINVAL", "mmap.private")),  # M10
        (100, K, 3, True, None),  # M32
        (K, 0, 1, True, None),  # M5
    ],
)
def test_mmap_answers_as_linux_6_18_did(
    machine: Machine, size: int, offset: int, prot: int, shared: bool, expected: tuple[str, str] | None
) -> None:
    call = machine.host.process.mmap(machine.gmem.fd, size, offset, prot=prot, shared=shared)
    if expected is None:
        machine.host.run(call)
        return
    with pytest.raises(Refusal) as caught:
        machine.host.run(call)
    assert (errno.errorcode[caught.value.errno or 0], caught.value.rule) == expected


@pytest.mark.parametrize("shared", [True, False])
def test_a_file_without_the_mmap_flag_is_enodev_even_for_map_private(machine: Machine, shared: bool) -> None:
    """Rows M1, M2, M12."""
    for init_shared in (False, True):
        gmem = machine.vm.create_guest_memfd(K, init_shared=init_shared)
        with pytest.raises(Refusal) as caught:
            machine.host.run(machine.host.process.mmap(gmem.fd, K, shared=shared))
        assert (caught.value.errno, caught.value.rule) == (errno.ENODEV, "mmap.not_mappable")
        gmem.close()


def test_mmap_without_init_shared_maps_and_every_touch_is_sigbus(machine: Machine) -> None:
    """Golden surprise 2."""
    gmem = machine.vm.create_guest_memfd(K, mmap=True)
    view = gmem.mmap()
    gmem.allocate(0, K)
    with pytest.raises(SigBus):
        view[0]
    assert gmem.statistics().allocated == 1


def test_a_read_only_mapping_segfaults_on_write(machine: Machine) -> None:
    """Row V34."""
    hva = machine.host.run(machine.host.process.mmap(machine.gmem.fd, K, prot=1))
    assert machine.host.run(machine.host.process.mm.read(hva, 1)) == b"\0"
    with pytest.raises(SigSegv) as caught:
        machine.host.run(machine.host.process.mm.write(hva, b"x"))
    assert caught.value.hva == hva
    with pytest.raises(SigSegv):
        machine.host.run(machine.host.process.mm.read(0x1000, 1))
    with pytest.raises(SigSegv):
        machine.host.run(machine.host.process.mm.read(1 << 63, 1))


def test_punching_a_mapped_page_zeroes_it_alone(machine: Machine) -> None:
    """Row T21."""
    for page in range(3):
        machine.view[page * K : page * K + 1] = b"Z"
    machine.gmem.punch_hole(K, K)
    assert [machine.view[page * K] for page in range(3)] == [0x5A, 0, 0x5A]


def test_dontneed_keeps_bytes_and_remove_punches(machine: Machine) -> None:
    """Rows V5, V7."""
    machine.view[0:4] = b"keep"
    mm = machine.host.process.mm
    machine.host.run(mm.discard(machine.view.hva, K))
    assert len(mm.page_table) == 0
    assert machine.view[0:4] == b"keep"
    machine.host.run(mm.remove(machine.view.hva, K))
    assert machine.view[0:4] == bytes(4)
    with pytest.raises(Refusal) as caught:
        machine.host.run(mm.discard(machine.view.hva + 1, K))
    assert caught.value.rule == "range.unaligned"
    with pytest.raises(Refusal) as caught:
        machine.host.run(mm.discard(machine.view.hva, 1 << 30))
    assert (caught.value.errno, caught.value.rule) == (errno.ENOMEM, "madvise.unmapped")


def test_unmapping_the_middle_leaves_both_ends(machine: Machine) -> None:
    machine.view[0] = 1
    machine.view[7 * K] = 7
    machine.view[3 * K] = 3
    mm = machine.host.process.mm
    machine.host.run(mm.unmap(machine.view.hva + 2 * K, 3 * K))
    assert [machine.view[0], machine.view[7 * K]] == [1, 7]
    with pytest.raises(SigSegv):
        machine.view[3 * K]
    assert machine.gmem.mmap()[3 * K] == 3
    mm.check()


def test_the_memory_lives_as_long_as_a_mapping(machine: Machine) -> None:
    """Rows S13, S15, S16, R98 to R101: descriptors may all be closed."""
    machine.view[0:4] = b"live"
    machine.vm.close()
    machine.gmem.close()
    assert machine.view[0:4] == b"live"
    assert machine.view[5 * K] == 0
    assert not machine.gmem.inode.destroyed
    machine.host.run(machine.host.process.mm.unmap(machine.view.hva, 8 * K))
    assert machine.gmem.inode.destroyed
    assert machine.vm.kvm.destroyed
    assert machine.host.pool.statistics().allocated == 0


def test_a_forked_child_sees_shared_bytes_and_no_private_ones(machine: Machine) -> None:
    """Rows S3, S9; and what userfaultfd alone would get wrong."""
    machine.view[0:6] = b"parent"
    machine.gmem.convert(K, K, Access.PRIVATE)
    child = machine.host.run(machine.host.process.fork())
    assert machine.host.run(child.mm.read(machine.view.hva, 6)) == b"parent"
    machine.host.run(child.mm.write(machine.view.hva, b"child!"))
    assert machine.view[0:6] == b"child!"
    with pytest.raises(SigBus):
        machine.host.run(child.mm.read(machine.view.hva + K, 1))
    machine.gmem.convert(0, K, Access.PRIVATE)
    with pytest.raises(SigBus):
        machine.host.run(child.mm.read(machine.view.hva, 1))
    machine.gmem.convert(0, K, Access.SHARED)
    machine.gmem.close()
    machine.host.run(child.exit())
    assert machine.view[0:6] == b"child!"


def test_conversion_unmaps_every_process(machine: Machine) -> None:
    child = machine.host.run(machine.host.process.fork())
    for mm in (machine.host.process.mm, child.mm):
        machine.host.run(mm.read(machine.view.hva, 1))
    seen: list[event.Event] = []
    machine.host.tracer.listen(seen.append)
    machine.gmem.convert(0, K, Access.PRIVATE)
    assert {zap.mm for zap in seen if isinstance(zap, event.UserZap)} == {
        machine.host.process.mm.number,
        child.mm.number,
    }
    machine.host.run(child.exit())


def test_anonymous_memory_is_private_to_a_process_and_lost_by_dontneed(machine: Machine) -> None:
    view = machine.host.anonymous(2 * K)
    view[0:4] = b"anon"
    child = machine.host.run(machine.host.process.fork())
    machine.host.run(child.mm.write(view.hva, b"kids"))
    assert view[0:4] == b"anon"
    assert machine.host.run(child.mm.read(view.hva, 4)) == b"kids"
    machine.host.run(child.exit())
    machine.host.run(machine.host.process.mm.discard(view.hva, K))
    assert view[0:4] == bytes(4)


def test_view_is_a_bytearray_of_fixed_length(machine: Machine) -> None:
    view = machine.view
    assert len(view) == 8 * K
    view[-1] = 9
    assert view[8 * K - 1] == 9
    assert view[-1:] == b"\x09"
    view[0:3] = 7
    assert view[0:4] == b"\7\7\7\0"
    with pytest.raises(IndexError):
        view[8 * K]
    with pytest.raises(IndexError):
        view.read(8 * K - 1, 2)
    with pytest.raises(ValueError, match="into a slice"):
        view[0:3] = b"four"
    with pytest.raises(ValueError, match="no steps"):
        view[0:4:2]
