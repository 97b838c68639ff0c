"""Pins: what they hold, what they stop, and the race that they must not win."""

from __future__ import annotations

import errno

import pytest

from guestmem.memory import PAGE_SIZE, Access
from guestmem.trace import Refusal
from tests.userspace.conftest import Machine

K = PAGE_SIZE


def test_a_pin_makes_conversion_busy_until_it_ends(machine: Machine) -> None:
    machine.view[2 * K : 2 * K + 3] = b"dma"
    pin = machine.gmem.pin(machine.view, 2 * K, 1)
    with pytest.raises(Refusal) as caught:
        machine.gmem.convert(0, 8 * K, Access.PRIVATE)
    assert (caught.value.errno, caught.value.rule) == (errno.EAGAIN, "convert.busy")
    assert caught.value.facts["error_offset"] == 2 * K
    assert machine.view[2 * K : 2 * K + 3] == b"dma", "entries that were dropped fault in again"
    pin.unpin()
    machine.gmem.convert(0, 8 * K, Access.PRIVATE)


def test_a_private_page_cannot_be_pinned_and_nothing_stays_pinned(machine: Machine) -> None:
    machine.gmem.convert(3 * K, K, Access.PRIVATE)
    with pytest.raises(Refusal) as caught:
        machine.gmem.pin(machine.view, 0, 5)
    assert (caught.value.errno, caught.value.rule) == (errno.EFAULT, "user.page")
    assert not machine.gmem.inode.folios.references
    assert not machine.host.userspace.pins


def test_pins_see_and_write_the_same_bytes_as_mappings(machine: Machine) -> None:
    pin = machine.gmem.pin(machine.view, K, 2)
    machine.view[2 * K] = 5
    assert pin.pages == 2
    assert pin.read(1, 1) == b"\5"
    pin.write(0, b"device")
    assert machine.view[K : K + 6] == b"device"
    pin.unpin()


def test_a_pinned_page_survives_its_hole_detached(machine: Machine) -> None:
    machine.view[0:5] = b"bytes"
    pin = machine.gmem.pin(machine.view, 0, 1)
    machine.gmem.punch_hole(0, K)
    assert pin.read(0, 5) == b"bytes"
    assert machine.view[0:5] == bytes(5)
    pin.write(0, b"later")
    assert machine.view[0:5] == bytes(5)
    assert machine.host.pool.statistics().detached == 1
    pin.unpin()
    assert machine.host.pool.statistics().detached == 0


def test_a_hole_through_a_pin_lets_the_page_be_converted(machine: Machine) -> None:
    pin = machine.gmem.pin(machine.view, 0, 1)
    machine.gmem.punch_hole(0, K)
    machine.gmem.convert(0, K, Access.PRIVATE)
    assert machine.gmem.accesses()[0] == (0, K, Access.PRIVATE)
    pin.unpin()


@pytest.mark.parametrize(("offset", "pages"), [(1, 1), (0, 0), (0, -1)])
def test_an_absurd_pin_is_refused(machine: Machine, offset: int, pages: int) -> None:
    with pytest.raises(Refusal) as caught:
        machine.gmem.pin(machine.view, offset, pages)
    assert caught.value.rule == "range.unaligned"


def test_anonymous_pages_can_be_pinned_too(machine: Machine) -> None:
    view = machine.host.anonymous(K)
    view[0:1] = b"a"
    pin = machine.host.run(machine.host.process.pin(view.hva, 1))
    machine.host.run(machine.host.process.mm.discard(view.hva, K))
    assert pin.read(0, 1) == b"a"
    pin.unpin()
