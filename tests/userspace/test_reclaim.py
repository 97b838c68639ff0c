"""Anonymous pages that are saved and freed when memory is short, and what must not be lost by it. Source: mm/vmscan.c
shrink_folio_list; 97cd21d57e9b."""

from __future__ import annotations

from guestmem.memory import PAGE_SIZE, FolioReference, write_host
from guestmem.userspace import View
from tests.userspace.conftest import Machine

K = PAGE_SIZE


def reclaim(machine: Machine, view: View, page: int = 0) -> bool:
    return machine.host.run(machine.host.process.mm.reclaim(view.hva + page * K), "reclaim")


def hold(machine: Machine, view: View) -> FolioReference:
    """As KVM holds a page whose contents it may correct."""
    return machine.host.run(machine.host.process.mm.pin_page(view.hva, write=True), "pin")


def test_what_was_stored_comes_back(machine: Machine) -> None:
    view = machine.host.anonymous(2 * K)
    view[0:5] = b"bytes"
    before = machine.host.pool.statistics().allocated
    assert reclaim(machine, view)
    assert machine.host.pool.statistics().allocated == before - 1
    assert view[0:5] == b"bytes"
    assert reclaim(machine, view), "clean, and so free without being saved again"
    view[0] = ord("B")
    assert reclaim(machine, view)
    assert view[0:5] == b"Bytes"


def test_a_page_that_is_not_there_is_not_freed(machine: Machine) -> None:
    view = machine.host.anonymous(K)
    assert not reclaim(machine, view)
    assert not machine.host.run(machine.host.process.mm.reclaim(view.hva + K), "reclaim"), "nothing is mapped there"
    machine.view[0] = 1
    assert not reclaim(machine, machine.view), "a guest_memfd's are unevictable"


def test_a_held_page_is_saved_and_stays(machine: Machine) -> None:
    view = machine.host.anonymous(K)
    view[0:3] = b"old"
    held = hold(machine, view)
    assert not reclaim(machine, view)
    write_host(held.hva, b"new")
    held.set_dirty()
    held.put()
    assert reclaim(machine, view)
    assert view[0:3] == b"new"


def test_who_does_not_say_that_he_wrote_loses_it(machine: Machine) -> None:
    """What known bug B17 is about."""
    view = machine.host.anonymous(K)
    view[0:3] = b"old"
    held = hold(machine, view)
    assert not reclaim(machine, view)
    write_host(held.hva, b"new")
    held.put()
    assert reclaim(machine, view)
    assert view[0:3] == b"old"


def test_a_pin_says_that_it_wrote(machine: Machine) -> None:
    """unpin_user_pages_dirty_lock."""
    view = machine.host.anonymous(K)
    view[0:3] = b"old"
    pin = machine.host.run(machine.host.process.pin(view.hva, 1), "pin")
    assert not reclaim(machine, view)
    pin.write(0, b"new")
    pin.unpin()
    assert reclaim(machine, view)
    assert view[0:3] == b"new"


def test_a_child_has_what_was_saved(machine: Machine) -> None:
    view = machine.host.anonymous(2 * K)
    view[0:5] = b"saved"
    view[K : K + 7] = b"present"
    assert reclaim(machine, view)
    child = machine.host.run(machine.host.process.fork(), "fork")
    assert machine.host.run(child.mm.read(view.hva, 5), "read") == b"saved"
    assert machine.host.run(child.mm.reclaim(view.hva + K), "reclaim")
    assert machine.host.run(child.mm.read(view.hva + K, 7), "read") == b"present"
    machine.host.run(child.exit(), "exit")


def test_what_was_discarded_does_not_come_back(machine: Machine) -> None:
    view = machine.host.anonymous(K)
    view[0:5] = b"bytes"
    assert reclaim(machine, view)
    machine.host.run(machine.host.process.mm.discard(view.hva, K), "discard")
    assert view[0:5] == bytes(5)
