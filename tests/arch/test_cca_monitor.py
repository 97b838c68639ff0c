"""Every call of the Realm Management Monitor and what it returns at the wrong time. The rows follow the failure
conditions of the RMM specification 1.0 (DEN0137) as TF-RMM's runtime/rmi has them, which each names."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import pytest

from guestmem.arch import FirmwareError
from guestmem.arch.cca import Monitor
from guestmem.arch.cca.realm import PROTECTED_FRAMES, GranuleState, Hipas, Ripas, Rtte
from guestmem.memory import PAGE_SIZE, Pfn
from tests.arch.memory import Pages

RD, ROOT, REC, NS = Pfn(1), Pfn(2), Pfn(3), Pfn(99)
TABLES = (Pfn(10), Pfn(11), Pfn(12))
SPARE = Pfn(13)
GFN = 0x200
Step = Callable[["Machine"], object]


class Machine(Monitor):
    def __init__(self) -> None:
        super().__init__()
        self.memory = Pages(1024, first=1024)
        for pfn in (RD, ROOT, REC, *TABLES, SPARE):
            self.granule_delegate(pfn)

    def page(self, number: int = 0) -> Pfn:
        return self.memory.block(number).pfn

    def data(self, gfn: int = GFN, number: int = 0) -> None:
        self.data_create(RD, self.page(number), gfn, self.memory.block(number).hva, b"image".ljust(PAGE_SIZE, b"\0"))

    def unknown(self, gfn: int = GFN, number: int = 0) -> None:
        self.data_create_unknown(RD, self.page(number), gfn, self.memory.block(number).hva)

    def fresh_data(self, gfn: int) -> None:
        self.granule_delegate(self.page(1))
        self.data(gfn, 1)

    def fresh_unknown(self, gfn: int) -> None:
        self.granule_delegate(self.page(1))
        self.unknown(gfn, 1)


def bare(m: Machine) -> None:
    pass


def created(m: Machine) -> None:
    m.realm_create(RD, ROOT)


def with_rec(m: Machine) -> None:
    created(m)
    m.rec_create(RD, REC)


def tables(m: Machine) -> None:
    created(m)
    for level, table in enumerate(TABLES, start=1):
        m.rtt_create(RD, table, 0 if level < 3 else GFN, level)
    m.granule_delegate(m.page())


def ram(m: Machine) -> None:
    tables(m)
    m.rtt_init_ripas(RD, GFN)


def data(m: Machine) -> None:
    ram(m)
    m.data()


def active(m: Machine) -> None:
    data(m)
    m.rec_create(RD, REC)
    m.realm_activate(RD)


def running(m: Machine) -> None:
    active(m)
    m.rec_enter(RD, REC)


def block(m: Machine) -> None:
    tables(m)
    for number in range(512):
        if number:
            m.granule_delegate(m.page(number))
        m.unknown(GFN + number, number)
    m.rtt_fold(RD, GFN, 3)


def destroyed(m: Machine) -> None:
    data(m)
    m.data_destroy(RD, GFN)


def gigabyte(m: Machine) -> None:
    """A table of 512 blocks, as if each had been folded."""
    created(m)
    m.rtt_create(RD, TABLES[0], 0, 1)
    m.rtt_create(RD, TABLES[1], 0, 2)
    for number in range(512):
        m.realms[RD].set(512 * number, 2, Rtte(Hipas.ASSIGNED, Ripas.RAM, Pfn(512 * (number + 512))))


_ROWS: list[tuple[Step, Step, str, str]] = [
    (bare, lambda m: m.granule_delegate(RD), "RMI_ERROR_INPUT", "granule.c smc_granule_delegate: not NS"),
    (bare, lambda m: m.granule_undelegate(NS), "RMI_ERROR_INPUT", "granule.c smc_granule_undelegate: not DELEGATED"),
    (data, lambda m: m.granule_delegate(m.page()), "RMI_ERROR_INPUT", "granule.c smc_granule_delegate: not NS"),
    (
        data,
        lambda m: m.granule_undelegate(m.page()),
        "RMI_ERROR_INPUT",
        "granule.c smc_granule_undelegate: not DELEGATED",
    ),
    (created, lambda m: m.granule_undelegate(RD), "RMI_ERROR_INPUT", "granule.c smc_granule_undelegate: not DELEGATED"),
    (
        created,
        lambda m: m.granule_undelegate(ROOT),
        "RMI_ERROR_INPUT",
        "granule.c smc_granule_undelegate: not DELEGATED",
    ),
    (bare, lambda m: m.realm_create(NS, ROOT), "RMI_ERROR_INPUT", "realm.c find_lock_rd_granules"),
    (bare, lambda m: m.realm_create(RD, NS), "RMI_ERROR_INPUT", "realm.c find_lock_rd_granules"),
    (bare, lambda m: m.realm_create(RD, RD), "RMI_ERROR_INPUT", "realm.c smc_realm_create: aliased"),
    (created, lambda m: m.realm_create(RD, SPARE), "RMI_ERROR_INPUT", "realm.c find_lock_rd_granules"),
    (bare, lambda m: m.realm_activate(RD), "RMI_ERROR_INPUT", "realm.c smc_realm_activate: no RD"),
    (active, lambda m: m.realm_activate(RD), "RMI_ERROR_REALM", "realm.c smc_realm_activate: not NEW"),
    (active, lambda m: m.realm_destroy(RD), "RMI_ERROR_REALM", "realm.c smc_realm_destroy: the RD is in use"),
    (tables, lambda m: m.realm_destroy(RD), "RMI_ERROR_REALM", "realm.c total_root_rtt_refcount"),
    (bare, lambda m: m.realm_destroy(RD), "RMI_ERROR_INPUT", "realm.c smc_realm_destroy: no RD"),
    (created, lambda m: m.rec_create(RD, NS), "RMI_ERROR_INPUT", "rec.c smc_rec_create: not DELEGATED"),
    (active, lambda m: m.rec_create(RD, SPARE), "RMI_ERROR_REALM", "rec.c smc_rec_create: not NEW"),
    (running, lambda m: m.rec_destroy(RD, REC), "RMI_ERROR_REC", "rec.c smc_rec_destroy: in use"),
    (running, lambda m: m.rec_enter(RD, REC), "RMI_ERROR_REC", "run.c smc_rec_enter: in use"),
    (with_rec, lambda m: m.rec_enter(RD, REC), "RMI_ERROR_REALM", "run.c smc_rec_enter: NEW"),
    (created, lambda m: m.rec_destroy(RD, REC), "RMI_ERROR_INPUT", "rec.c smc_rec_destroy: not REC"),
    # Tables
    (created, lambda m: m.rtt_create(RD, NS, 0, 1), "RMI_ERROR_INPUT", "rtt.c smc_rtt_create: not DELEGATED"),
    (created, lambda m: m.rtt_create(RD, SPARE, 0, 0), "RMI_ERROR_INPUT", "rtt.c validate_rtt_structure_cmds"),
    (created, lambda m: m.rtt_create(RD, SPARE, 0, 4), "RMI_ERROR_INPUT", "rtt.c validate_rtt_structure_cmds"),
    (created, lambda m: m.rtt_create(RD, SPARE, 1, 1), "RMI_ERROR_INPUT", "rtt.c validate_rtt_structure_cmds"),
    (created, lambda m: m.rtt_create(RD, SPARE, 0, 3), "RMI_ERROR_RTT(0)", "rtt.c smc_rtt_create: the walk ends early"),
    (tables, lambda m: m.rtt_create(RD, SPARE, GFN, 3), "RMI_ERROR_RTT(2)", "rtt.c smc_rtt_create: a table already"),
    (data, lambda m: m.rtt_destroy(RD, GFN, 3), "RMI_ERROR_RTT(3)", "rtt.c smc_rtt_destroy: entries are live"),
    (tables, lambda m: m.rtt_destroy(RD, 0, 1), "RMI_ERROR_RTT(1)", "rtt.c smc_rtt_destroy: entries are live"),
    (tables, lambda m: m.rtt_destroy(RD, 0, 3), "RMI_ERROR_RTT(2)", "rtt.c smc_rtt_destroy: no table"),
    (created, lambda m: m.rtt_destroy(RD, 0, 2), "RMI_ERROR_RTT(0)", "rtt.c smc_rtt_destroy: the walk ends early"),
    (data, lambda m: m.rtt_fold(RD, GFN, 3), "RMI_ERROR_RTT(3)", "rtt.c smc_rtt_fold: the entries differ"),
    (tables, lambda m: m.rtt_fold(RD, 0, 1), "RMI_ERROR_RTT(1)", "rtt.c smc_rtt_fold: the entries differ"),
    (tables, lambda m: m.rtt_fold(RD, 0, 3), "RMI_ERROR_RTT(2)", "rtt.c smc_rtt_fold: no table"),
    (gigabyte, lambda m: m.rtt_fold(RD, 0, 2), "RMI_ERROR_RTT(1)", "rtt.c smc_rtt_fold: S2TT_MIN_BLOCK_LEVEL"),
    # Pages
    (active, lambda m: m.rtt_init_ripas(RD, GFN + 1), "RMI_ERROR_REALM", "rtt.c smc_rtt_init_ripas: not NEW"),
    (
        data,
        lambda m: m.rtt_init_ripas(RD, GFN),
        "RMI_ERROR_RTT(3)",
        "rtt.c smc_rtt_init_ripas: neither UNASSIGNED EMPTY nor RAM",
    ),
    (destroyed, lambda m: m.rtt_init_ripas(RD, GFN), "RMI_ERROR_RTT(3)", "rtt.c smc_rtt_init_ripas: DESTROYED"),
    (created, lambda m: m.rtt_init_ripas(RD, GFN), "RMI_ERROR_RTT(0)", "rtt.c smc_rtt_init_ripas: the walk ends early"),
    (
        tables,
        lambda m: m.rtt_init_ripas(RD, PROTECTED_FRAMES),
        "RMI_ERROR_INPUT",
        "rtt.c smc_rtt_init_ripas: addr_in_par",
    ),
    (active, lambda m: m.rtt_init_ripas(RD, PROTECTED_FRAMES), "RMI_ERROR_INPUT", "rtt.c smc_rtt_init_ripas: order"),
    (tables, lambda m: m.data(), "RMI_ERROR_RTT(3)", "rtt.c data_create: not UNASSIGNED RAM"),
    (ram, lambda m: m.data(number=1), "RMI_ERROR_INPUT", "rtt.c data_create: not DELEGATED"),
    (ram, lambda m: m.data(PROTECTED_FRAMES), "RMI_ERROR_INPUT", "rtt.c validate_data_create: addr_in_par"),
    (ram, lambda m: m.data(0), "RMI_ERROR_RTT(2)", "rtt.c data_create: the walk ends early"),
    (
        active,
        lambda m: m.fresh_data(GFN + 1),
        "RMI_ERROR_REALM",
        "rtt.c validate_data_create: not NEW",
    ),
    (
        data,
        lambda m: m.fresh_unknown(GFN),
        "RMI_ERROR_RTT(3)",
        "rtt.c data_create: not UNASSIGNED",
    ),
    (tables, lambda m: m.unknown(0), "RMI_ERROR_RTT(2)", "rtt.c data_create: the walk ends early"),
    (tables, lambda m: m.unknown(number=1), "RMI_ERROR_INPUT", "rtt.c data_create: not DELEGATED"),
    (tables, lambda m: m.data_destroy(RD, GFN), "RMI_ERROR_RTT(3)", "rtt.c smc_data_destroy: not ASSIGNED"),
    (tables, lambda m: m.data_destroy(RD, 0), "RMI_ERROR_RTT(2)", "rtt.c smc_data_destroy: the walk ends early"),
    (block, lambda m: m.data_destroy(RD, GFN), "RMI_ERROR_RTT(2)", "rtt.c smc_data_destroy: the walk ends early"),
    (tables, lambda m: m.data_destroy(RD, PROTECTED_FRAMES), "RMI_ERROR_INPUT", "rtt.c smc_data_destroy: addr_in_par"),
    (
        created,
        lambda m: m.ipa_state_set_ram(RD, GFN),
        "RMI_ERROR_RTT(0)",
        "rtt.c smc_rtt_set_ripas: the walk ends early",
    ),
]


@pytest.mark.parametrize(("before", "call", "code", "source"), _ROWS)
def test_refused(before: Step, call: Step, code: str, source: str) -> None:
    machine = Machine()
    before(machine)
    with pytest.raises(FirmwareError) as error:
        call(machine)
    assert error.value.code == code, source


def test_a_granule_comes_and_goes_wiped() -> None:
    machine = Machine()
    data(machine)
    assert machine.state(machine.page()) is GranuleState.DATA
    machine.data_destroy(RD, GFN)
    assert machine.realms[RD].get(GFN, 3)[:2] == (Hipas.UNASSIGNED, Ripas.DESTROYED)
    machine.granule_undelegate(machine.page(), machine.memory.block().hva)
    assert machine.memory.read(0) == b""


def test_a_granule_of_unknown_content_does_not_show_the_hosts() -> None:
    machine = Machine()
    tables(machine)
    machine.memory.write(0, b"the host's")
    machine.unknown()
    assert machine.memory.read(0) == b""
    assert machine.realms[RD].get(GFN, 3).ripas is Ripas.EMPTY  # until the realm says otherwise


def test_fold_and_unfold() -> None:
    machine = Machine()
    block(machine)
    realm = machine.realms[RD]
    assert realm.walk(GFN + 5, 3) == (2, realm.get(GFN, 2))
    assert realm.get(GFN, 2).pfn == machine.page()
    machine.rtt_create(RD, SPARE, GFN, 3)
    level, entry = realm.walk(GFN + 5, 3)
    assert (level, entry.pfn, entry.hva) == (3, machine.page(5), machine.memory.block(5).hva)


def test_a_destroyed_table_is_remembered() -> None:
    machine = Machine()
    data(machine)
    machine.data_destroy(RD, GFN)
    assert machine.rtt_destroy(RD, GFN, 3) == TABLES[2]
    assert machine.realms[RD].walk(GFN, 3)[1].ripas is Ripas.DESTROYED


def test_the_measurement_is_a_chain_of_descriptors() -> None:
    """RmmMeasurementDescriptorData: type, length, RIM so far, address, flags, hash of the page; 256 bytes."""
    machine = Machine()
    ram(machine)
    before = machine.realms[RD].measurement
    machine.data()
    content = hashlib.sha256(b"image".ljust(PAGE_SIZE, b"\0")).digest()
    words = [0, 0x100], [GFN * PAGE_SIZE, 1]
    first, second = (b"".join(word.to_bytes(8, "little") for word in pair) for pair in words)
    descriptor = (first + before.ljust(64, b"\0") + second + content.ljust(64, b"\0")).ljust(0x100, b"\0")
    assert machine.realms[RD].measurement == hashlib.sha256(descriptor).digest()


def test_the_gpt_may_refuse() -> None:
    refused = {"RMI_GRANULE_DELEGATE"}
    monitor = Monitor(lambda call: call in refused)
    with pytest.raises(FirmwareError, match="RMI_ERROR_INPUT"):
        monitor.granule_delegate(NS)
    refused.clear()
    monitor.granule_delegate(NS)
