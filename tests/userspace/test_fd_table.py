"""Descriptors: lowest free first, limits, dup, fork, close."""

from __future__ import annotations

import errno

import pytest

from guestmem.memory import PAGE_SIZE
from guestmem.trace import Refusal
from guestmem.userspace import FdTable
from tests.userspace.conftest import Machine


def test_the_lowest_free_number_is_given(machine: Machine) -> None:
    """Golden row N30."""
    fds = [machine.vm.create_guest_memfd(PAGE_SIZE).fd for _ in range(3)]
    assert fds == sorted(fds)
    machine.host.run(machine.host.process.fds.close(fds[1]))
    assert machine.vm.create_guest_memfd(PAGE_SIZE).fd == fds[1]


def test_a_full_table_refuses_and_a_reserved_number_is_taken(machine: Machine) -> None:
    table = FdTable(limit=1)
    assert table.reserve() == 0
    with pytest.raises(Refusal) as caught:
        table.reserve()
    assert (caught.value.errno, caught.value.rule) == (errno.EMFILE, "fd.limit")
    table.unreserve(0)
    assert table.reserve() == 0
    with pytest.raises(Refusal) as caught:
        table.get(0)
    assert (caught.value.errno, caught.value.rule) == (errno.EBADF, "fd.not_open")


def test_a_reserved_number_is_no_file_to_a_child(machine: Machine) -> None:
    reserved = machine.host.process.fds.reserve()
    child = machine.host.run(machine.host.process.fork())
    assert reserved not in child.fds.open_fds()
    machine.host.run(child.exit())
    machine.host.process.fds.unreserve(reserved)


def test_a_dup_keeps_the_file(machine: Machine) -> None:
    gmem = machine.vm.create_guest_memfd(PAGE_SIZE)
    twin = machine.host.process.fds.dup(gmem.fd)
    gmem.close()
    assert not gmem.inode.destroyed
    machine.host.run(machine.host.process.fds.close(twin))
    assert gmem.inode.destroyed
    with pytest.raises(Refusal) as caught:
        machine.host.run(machine.host.process.fds.close(twin))
    assert caught.value.errno == errno.EBADF
