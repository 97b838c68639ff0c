"""Views: which of several open files of one memfd a descriptor is, and which one was closed, by the kernel itself."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import socket
import struct
from collections.abc import Iterator

import pytest

from guestmem.serve.files import GmemFile
from guestmem.serve.views import Views, file_id


class File(GmemFile):
    """A file without anything behind it."""

    def __init__(self) -> None:
        self.view = 0
        self.locked = False


class Table:
    """A memfd, and the views of it that clients have."""

    def __init__(self) -> None:
        self.backing = os.memfd_create("test")
        self.views = Views()
        self.open: dict[File, int] = {}

    def add(self, adopted: bool = False) -> File:
        """One more view; those that there are were locked before, as a link does it."""
        for other, fd in self.open.items():
            if not other.locked:
                self.views.lock(other, fd)
        file = File()
        self.open[file] = self.views.open(file, self.backing, adopted)
        return file

    def close(self) -> None:
        for fd in self.open.values():
            os.close(fd)
        self.views.close()
        os.close(self.backing)


@pytest.fixture
def table() -> Iterator[Table]:
    made = Table()
    yield made
    made.close()


def test_one_view_is_gone_with_the_event(table: Table) -> None:
    file = table.add()
    duplicate = os.dup(table.open[file])
    os.close(table.open.pop(file))
    assert table.views.closed() == []
    os.close(duplicate)
    assert table.views.closed() == [file]
    assert table.views.nap_ms() is None


@pytest.mark.parametrize("seed", range(20))
def test_the_one_that_was_closed_is_the_one_that_is_found(table: Table, seed: int) -> None:
    """close() has returned, so its lock is gone: nothing needs to be waited for."""
    draw = random.Random(seed)
    files = [table.add() for _ in range(5)]
    draw.shuffle(files)
    for file in files:
        os.close(table.open.pop(file))
        assert table.views.closed() == [file]
    assert not table.views.doubtful


def test_views_have_numbers_that_go_with_the_descriptor(table: Table) -> None:
    files = [table.add() for _ in range(3)]
    st_ino = os.fstat(table.backing).st_ino
    assert table.views.has_several(st_ino)
    ours, theirs = socket.socketpair()
    for number, file in enumerate(files):
        socket.send_fds(ours, [b"x"], [table.open[file]])
        _, (received,), _, _ = socket.recv_fds(theirs, 1, 1)
        assert os.lseek(received, 0, os.SEEK_CUR) == number == file.view
        assert file_id(st_ino, number) == st_ino | number << 48
        os.close(received)
    ours.close()
    theirs.close()
    assert table.views.closed() == []


def test_a_number_comes_back_when_its_view_is_gone(table: Table) -> None:
    first, _ = table.add(), table.add()
    os.close(table.open.pop(first))
    table.views.closed()
    assert table.add().view == 2
    assert table.views.any_of(os.fstat(table.backing).st_ino) is not first


def test_a_file_that_is_not_linked_has_no_lock(table: Table) -> None:
    """A client may lock all of it, as that of a kernel may."""
    file = table.add()
    everything = struct.pack("hh4xqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    assert fcntl.fcntl(table.open[file], fcntl.F_SETLK, everything)
    with open(f"/proc/self/fdinfo/{table.backing}") as info:
        assert "lock:" not in info.read()


def test_memory_of_before_may_be_open_elsewhere(table: Table) -> None:
    """The end of somebody's open file of it is not the end of ours."""
    file = table.add(adopted=True)
    os.close(os.open(f"/proc/self/fd/{table.backing}", os.O_RDWR))
    assert table.views.closed() == []
    os.close(table.open.pop(file))
    assert table.views.closed() == [file]


def test_a_position_that_is_no_views_is_the_first_one() -> None:
    assert file_id(5, 1 << 15) == file_id(5, -1) == file_id(5, 0) == 5


def test_processes_that_are_killed_leave_no_view_behind(table: Table) -> None:
    """The event may come before the lock is gone, and two events may be one: the loop looks again."""
    files = [table.add() for _ in range(40)]
    children = []
    for file in files[1:]:
        child = os.fork()
        if not child:
            for other, fd in table.open.items():
                if other is not file:
                    os.close(fd)
            signal.pause()
        children.append(child)
    for file in files[1:]:
        os.close(table.open.pop(file))
    table.views.closed()
    for child in children:
        os.kill(child, signal.SIGKILL)
    for child in children:
        os.waitpid(child, 0)
    gone = set(table.views.closed() + table.views.look_at_all())
    assert gone == set(files[1:])
