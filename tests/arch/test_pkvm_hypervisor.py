"""Every call of pKVM's hypervisor and what it returns in each state of a page. Source of the rows: mem_protect.c and
pkvm.c in arch/arm64/kvm/hyp/nvhe, where a row does not say otherwise."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from guestmem.arch import FirmwareError
from guestmem.arch.pkvm import Hypervisor, PageState
from tests.arch.memory import Pages

VM, GFN = 7, 0x80
Step = Callable[["Machine"], object]


class Machine(Hypervisor):
    def __init__(self) -> None:
        super().__init__()
        self.memory = Pages(2)
        self.page = self.memory.block().pfn
        self.other = self.memory.block(1).pfn
        self.init_vm(VM)

    def donate(self, gfn: int = GFN) -> None:
        self.host_donate_guest(VM, self.page, gfn, self.memory.block().hva)


def _donated(m: Machine) -> None:
    m.donate()


def _lent(m: Machine) -> None:
    m.donate()
    m.guest_share_host(VM, GFN)


def _with_hyp(m: Machine) -> None:
    m.host_share_hyp(m.page)


def _hyps(m: Machine) -> None:
    m.host_donate_hyp(m.page)


def _dying(m: Machine) -> None:
    m.donate()
    m.start_teardown_vm(VM)


def _new(m: Machine) -> None:
    pass


def _loaded(m: Machine) -> None:
    m.vms[VM].loaded_vcpus = 1


_ROWS: list[tuple[Step, Step, str, str]] = [
    (_new, lambda m: m.host_unshare_hyp(m.page), "-EPERM", "__pkvm_host_unshare_hyp"),
    (_with_hyp, lambda m: m.host_share_hyp(m.page), "-EPERM", "__pkvm_host_share_hyp"),
    (_with_hyp, lambda m: m.host_donate_hyp(m.page), "-EPERM", "__pkvm_host_donate_hyp"),
    (_with_hyp, lambda m: m.donate(), "-EPERM", "__pkvm_host_donate_guest"),
    (_hyps, lambda m: m.host_share_hyp(m.page), "-EPERM", "__pkvm_host_share_hyp"),
    (_hyps, lambda m: m.donate(), "-EPERM", "__pkvm_host_donate_guest"),
    (_new, lambda m: m.hyp_donate_host(m.page), "-EPERM", "__pkvm_hyp_donate_host"),
    (_donated, lambda m: m.donate(GFN + 1), "-EPERM", "__pkvm_host_donate_guest, not the host's"),
    (_donated, lambda m: m.host_donate_guest(VM, m.other, GFN, 0), "-EPERM", "__pkvm_host_donate_guest, guest's state"),
    (_donated, lambda m: m.host_donate_hyp(m.page), "-EPERM", "__pkvm_host_donate_hyp"),
    (_donated, lambda m: m.hyp_donate_host(m.page), "-EPERM", "__pkvm_hyp_donate_host"),
    (_donated, lambda m: m.guest_unshare_host(VM, GFN), "-EPERM", "__pkvm_guest_unshare_host"),
    (_new, lambda m: m.guest_share_host(VM, GFN), "-ENOENT", "get_valid_guest_pte"),
    (_lent, lambda m: m.guest_share_host(VM, GFN), "-EPERM", "__pkvm_guest_share_host"),
    (_lent, lambda m: m.host_share_hyp(m.page), "-EPERM", "__pkvm_host_share_hyp"),
    (_lent, lambda m: m.donate(GFN + 1), "-EPERM", "__pkvm_host_donate_guest"),
    (_new, lambda m: m.host_force_reclaim_page_guest(m.page), "-EAGAIN", "force_reclaim: not PKVM_NOPAGE"),
    (_lent, lambda m: m.host_force_reclaim_page_guest(m.page), "-EAGAIN", "force_reclaim: not PKVM_NOPAGE"),
    (_hyps, lambda m: m.host_force_reclaim_page_guest(m.page), "-EPERM", "host_stage2_decode_gfn_meta"),
    (_donated, lambda m: m.reclaim_dying_guest_page(VM, GFN), "-EINVAL", "__pkvm_reclaim_dying_guest_page"),
    (_dying, lambda m: m.reclaim_dying_guest_page(VM, GFN + 1), "-ENOENT", "get_valid_guest_pte"),
    (_dying, lambda m: m.guest_share_host(VM, GFN), "-EINVAL", "pkvm_load_hyp_vcpu, a dying VM"),
    (_dying, lambda m: m.host_donate_guest(VM, m.other, GFN + 1, 0), "-EINVAL", "pkvm_load_hyp_vcpu, a dying VM"),
    (_dying, lambda m: m.start_teardown_vm(VM), "-EINVAL", "__pkvm_start_teardown_vm"),
    (_loaded, lambda m: m.start_teardown_vm(VM), "-EINVAL", "get_pkvm_unref_hyp_vm_locked"),
    (_new, lambda m: m.start_teardown_vm(VM + 1), "-EINVAL", "get_pkvm_unref_hyp_vm_locked"),
    (_new, lambda m: m.finalize_teardown_vm(VM), "-EINVAL", "__pkvm_finalize_teardown_vm"),
    (_new, lambda m: m.finalize_teardown_vm(VM + 1), "-EINVAL", "get_pkvm_unref_hyp_vm_locked"),
    (_new, lambda m: m.host_donate_guest(VM + 1, m.page, GFN, 0), "-EINVAL", "pkvm_get_loaded_hyp_vcpu"),
    (_new, lambda m: m.init_vm(VM), "-EEXIST", "insert_vm_table_entry"),
]


@pytest.mark.parametrize(("before", "call", "code", "source"), _ROWS)
def test_refused(before: Step, call: Step, code: str, source: str) -> None:
    machine = Machine()
    before(machine)
    states = dict(machine.host), dict(machine.hyp), dict(machine.vms[VM].pages)
    with pytest.raises(FirmwareError) as error:
        call(machine)
    assert error.value.code == code, source
    assert (machine.host, machine.hyp, machine.vms[VM].pages) == states


def test_lending_keeps_bytes_both_ways() -> None:
    machine = Machine()
    machine.memory.write(0, b"from the host")
    machine.donate()
    assert machine.memory.read(0) == b"from the host"
    machine.guest_share_host(VM, GFN)
    assert machine.host[machine.page] is PageState.SHARED_BORROWED
    machine.guest_unshare_host(VM, GFN)
    assert machine.host[machine.page] is PageState.NOPAGE
    assert machine.memory.read(0) == b"from the host"


def _force(m: Machine) -> None:
    m.host_force_reclaim_page_guest(m.page)


def _tear_down(m: Machine) -> None:
    m.start_teardown_vm(VM)
    m.reclaim_dying_guest_page(VM, GFN)
    m.finalize_teardown_vm(VM)


@pytest.mark.parametrize(
    ("before", "take", "left"),
    [(_donated, _force, b""), (_donated, _tear_down, b""), (_lent, _tear_down, b"secret")],
)
def test_reclaim_scrubs_what_was_the_guests_alone(before: Step, take: Step, left: bytes) -> None:
    machine = Machine()
    machine.memory.write(0, b"secret")
    before(machine)
    take(machine)
    assert machine.memory.read(0) == left
    assert not machine.host
    assert not machine.owner


def test_the_hypervisor_takes_and_gives_back() -> None:
    machine = Machine()
    machine.host_donate_hyp(machine.page)
    assert (machine.host, machine.hyp) == ({machine.page: PageState.NOPAGE}, {machine.page: PageState.OWNED})
    machine.hyp_donate_host(machine.page)
    machine.host_share_hyp(machine.page)
    assert machine.host[machine.page] is PageState.SHARED_OWNED
    machine.host_unshare_hyp(machine.page)
    assert not machine.host
    assert not machine.hyp
    machine.donate()
