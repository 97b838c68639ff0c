"""Every call of the TDX module and what it returns when it is made at the wrong time. Each row names its source: a file
of intel/tdx-module (src/vmm_dispatcher/api_calls), or the ABI specification."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from guestmem.arch import FirmwareError
from guestmem.arch.tdx.manage import TDCS_PAGES
from guestmem.arch.tdx.memory_calls import MachineCheck
from guestmem.arch.tdx.parameters import TdParams, cpuid_configurable, cpuid_of
from guestmem.arch.tdx.status import TdxError
from guestmem.arch.tdx.td import LEVEL_2M, LEVEL_4K, Sept
from guestmem.cpu.cpuid import DEFAULT_CPUID
from guestmem.memory import PAGE_SIZE, Pfn
from tests.arch.tdx_machine import (
    CPU,
    GFN,
    HKID,
    OTHER,
    PAGE,
    TABLES,
    TDR,
    VCPU,
    Machine,
    added,
    blocked,
    blocked_while_inside,
    created,
    flushed,
    half_keyed,
    half_written_back,
    initialized,
    keyed,
    large,
    nothing,
    pending,
    runnable,
    torn_down,
    tracked,
    with_tables,
    with_tdcs,
    with_vcpu,
)


class Row(NamedTuple):
    """After `before`, `call` returns `code`."""

    before: Callable[[Machine], None]
    call: Callable[[Machine], object]
    code: str
    source: str


def _init(**params: Any) -> Callable[[Machine], object]:
    return lambda m: m.mng_init(TDR, TdParams(**params))


_ROWS = (
    Row(nothing, lambda m: m.mng_key_config(TDR, 0), "PAGE_METADATA_INCORRECT|RCX", "check_lock_and_map_explicit_tdr"),
    Row(created, lambda m: m.mng_create(Pfn(2), HKID), "HKID_NOT_FREE", "tdh_mng_create.c"),
    Row(created, lambda m: m.mng_create(TDR, HKID + 1), "PAGE_METADATA_INCORRECT|RCX", "tdh_mng_create.c"),
    Row(nothing, lambda m: m.mng_create(TDR, 999), "OPERAND_INVALID|RDX", "ABI specification"),
    Row(
        half_keyed,
        lambda m: m.mng_key_config(TDR, 0),
        "KEY_CONFIGURED",
        "tdh_mng_key_config.c",
    ),
    Row(keyed, lambda m: m.mng_key_config(TDR, 0), "LIFECYCLE_STATE_INCORRECT", "tdh_mng_key_config.c"),
    Row(created, lambda m: m.mng_addcx(TDR, Pfn(10)), "TD_KEYS_NOT_CONFIGURED", "tdh_mng_add_cx.c"),
    Row(with_tdcs, lambda m: m.mng_addcx(TDR, Pfn(19)), "TDCX_NUM_INCORRECT", "tdh_mng_add_cx.c"),
    Row(keyed, lambda m: m.mng_addcx(TDR, TDR), "PAGE_METADATA_INCORRECT|RCX", "tdh_mng_add_cx.c"),
    Row(keyed, lambda m: m.mng_init(TDR), "TDCS_NOT_ALLOCATED", "tdh_mng_init.c, is_required_tdcs_allocated"),
    Row(initialized, lambda m: m.mng_init(TDR), "OP_STATE_INCORRECT", "tdh_mng_init.c"),
    Row(with_tdcs, _init(attributes=1 << 17), "OPERAND_INVALID|ATTRIBUTES", "verify_td_attributes"),
    Row(with_tdcs, _init(xfam=0b111), "OPERAND_INVALID|XFAM", "check_xfam, a bit that is fixed to 0"),
    Row(with_tdcs, _init(xfam=0b01), "OPERAND_INVALID|XFAM", "check_xfam, a bit that is fixed to 1"),
    Row(
        with_tdcs,
        _init(cpuid={(7, 0): (1, 0, 0, 0)}),
        "OPERAND_INVALID|CPUID_CONFIG",
        "read_and_set_cpuid_configurations, not configurable",
    ),
    Row(
        with_tdcs,
        _init(cpuid={(1, 0): (0x123, 0, 0, 0)}),
        "OPERAND_INVALID|CPUID_CONFIG",
        "read_and_set_cpuid_configurations, another family than the machine's",
    ),
    Row(with_tdcs, lambda m: m.vp_create(TDR, VCPU), "OP_STATE_INCORRECT", "tdh_vp_create.c"),
    Row(with_vcpu, lambda m: m.vp_create(TDR, VCPU), "PAGE_METADATA_INCORRECT|RCX", "tdh_vp_create.c"),
    Row(runnable, lambda m: m.vp_create(TDR, Pfn(21)), "OP_STATE_INCORRECT", "op_state_lookup.c, TDH_VP_CREATE_LEAF"),
    Row(with_vcpu, lambda m: m.vp_init(TDR, VCPU, CPU), "VCPU_STATE_INCORRECT", "tdh_vp_init.c"),
    Row(with_tables, lambda m: m.vp_init(TDR, VCPU, CPU), "PAGE_METADATA_INCORRECT|RCX", "tdh_vp_init.c"),
    Row(with_vcpu, lambda m: m.vp_enter(TDR, VCPU, CPU), "OP_STATE_INCORRECT", "tdh_vp_enter.c"),
    Row(runnable, lambda m: m.vp_enter(TDR, VCPU, CPU + 1), "VCPU_ASSOCIATED", "ABI specification, TDH.VP.ENTER"),
    Row(runnable, lambda m: m.vp_flush(TDR, VCPU, CPU + 1), "VCPU_NOT_ASSOCIATED", "tdh_vp_flush.c"),
    # Secure EPT
    Row(
        with_tdcs, lambda m: m.mem_sept_add(TDR, 0, 3, TABLES[0]), "OP_STATE_INCORRECT", "check_state_map_tdcs_and_lock"
    ),
    Row(initialized, lambda m: m.mem_sept_add(TDR, 0, 2, TABLES[0]), "EPT_WALK_FAILED|RCX", "tdh_mem_sept_add.c"),
    Row(initialized, lambda m: m.mem_sept_add(TDR, 0, 0, TABLES[0]), "OPERAND_INVALID|RCX", "tdh_mem_sept_add.c"),
    Row(initialized, lambda m: m.mem_sept_add(TDR, 1, 3, TABLES[0]), "OPERAND_INVALID|RCX", "verify_page_info_input"),
    Row(
        with_tables, lambda m: m.mem_sept_add(TDR, 0, 3, Pfn(39)), "EPT_ENTRY_STATE_INCORRECT|RCX", "tdh_mem_sept_add.c"
    ),
    Row(initialized, lambda m: m.mem_sept_add(TDR, 0, 3, TDR), "PAGE_METADATA_INCORRECT|R8", "tdh_mem_sept_add.c"),
    Row(runnable, lambda m: m.mem_sept_remove(TDR, GFN, 1), "GPA_RANGE_NOT_BLOCKED|RCX", "tdh_mem_sept_remove.c"),
    Row(added, lambda m: m.mem_sept_remove(TDR, GFN, 1), "EPT_PAGE_NOT_FREE|RCX", "tdh_mem_sept_remove.c"),
    # Pages in
    Row(
        initialized,
        lambda m: m.mem_page_add(TDR, GFN, m.page(), m.hva(), None),
        "EPT_WALK_FAILED|RCX",
        "tdh_mem_page_add.c",
    ),
    Row(
        runnable,
        lambda m: m.mem_page_add(TDR, GFN + 1, m.page(OTHER), m.hva(OTHER), None),
        "OP_STATE_INCORRECT",
        "tdh_mem_page_add.c",
    ),
    Row(
        added,
        lambda m: m.mem_page_add(TDR, GFN, m.page(OTHER), m.hva(OTHER), None),
        "EPT_ENTRY_STATE_INCORRECT|RCX",
        "tdh_mem_page_add.c",
    ),
    Row(
        added,
        lambda m: m.mem_page_add(TDR, GFN + 1, m.page(), m.hva(), None),
        "PAGE_METADATA_INCORRECT|R8",
        "tdh_mem_page_add.c",
    ),
    Row(
        with_tdcs,
        lambda m: m.mem_page_aug(TDR, GFN + 1, 0, m.page(OTHER), m.hva(OTHER)),
        "OP_STATE_INCORRECT",
        "op_state_lookup.c, TDH_MEM_PAGE_AUG_LEAF",
    ),
    Row(
        runnable,
        lambda m: m.mem_page_aug(TDR, GFN, 0, m.page(OTHER), m.hva(OTHER)),
        "EPT_ENTRY_STATE_INCORRECT|RCX",
        "tdh_mem_page_aug.c",
    ),
    Row(
        runnable,
        lambda m: m.mem_page_aug(TDR, GFN + 1, 0, m.page(), m.hva()),
        "PAGE_METADATA_INCORRECT|R8",
        "check_and_lock_free_range_hpa",
    ),
    Row(
        runnable,
        lambda m: m.mem_page_aug(TDR, 0x400, 1, m.page(), m.hva()),
        "PAGE_METADATA_INCORRECT|R8",
        "check_and_lock_free_range_hpa",
    ),
    Row(
        runnable,
        lambda m: m.mem_page_aug(TDR, 0x400, 1, m.page(OTHER), m.hva()),
        "OPERAND_INVALID|R8",
        "hpa_check_with_pwr_2_alignment",
    ),
    Row(
        runnable,
        lambda m: m.mem_page_aug(TDR, 0x40000, 2, m.page(), m.hva()),
        "OPERAND_INVALID|RCX",
        "tdh_mem_page_aug.c",
    ),
    Row(runnable, lambda m: m.page_accept(TDR, GFN, 0), "PAGE_ALREADY_ACCEPTED", "tdg_mem_page_accept.c"),
    Row(large, lambda m: m.page_accept(TDR, 0x40000, 0), "PAGE_SIZE_MISMATCH", "tdg_mem_page_accept.c"),
    Row(pending, lambda m: m.page_accept(TDR, GFN, 1), "PAGE_SIZE_MISMATCH", "tdg_mem_page_accept.c"),
    Row(pending, lambda m: m.page_accept(TDR, GFN + 1, 1), "OPERAND_INVALID|RCX", "tdg_mem_page_accept.c"),
    # Pages out
    Row(
        runnable, lambda m: m.mem_range_block(TDR, GFN + 1, 0), "EPT_ENTRY_STATE_INCORRECT|RCX", "tdh_mem_range_block.c"
    ),
    Row(blocked, lambda m: m.mem_range_block(TDR, GFN, 0), "GPA_RANGE_ALREADY_BLOCKED|RCX", "tdh_mem_range_block.c"),
    Row(
        runnable,
        lambda m: m.mem_range_unblock(TDR, GFN, 0),
        "EPT_ENTRY_STATE_INCORRECT|RCX",
        "tdh_mem_range_unblock.c, sept_state_is_seamcall_leaf_allowed",
    ),
    Row(blocked, lambda m: m.mem_range_unblock(TDR, GFN, 0), "TLB_TRACKING_NOT_DONE|RCX", "tdh_mem_range_unblock.c"),
    Row(runnable, lambda m: m.mem_page_remove(TDR, GFN, 0), "GPA_RANGE_NOT_BLOCKED|RCX", "tdh_mem_page_remove.c"),
    Row(blocked, lambda m: m.mem_page_remove(TDR, GFN, 0), "TLB_TRACKING_NOT_DONE|RCX", "tdh_mem_page_remove.c"),
    Row(
        blocked_while_inside,
        lambda m: m.mem_page_remove(TDR, GFN, 0),
        "TLB_TRACKING_NOT_DONE|RCX",
        "is_tlb_and_iotlb_tracked",
    ),
    Row(blocked_while_inside, lambda m: m.mem_track(TDR), "PREVIOUS_TLB_EPOCH_BUSY", "tdh_mem_track.c"),
    Row(with_tdcs, lambda m: m.mem_track(TDR), "OP_STATE_INCORRECT", "tdh_mem_track.c"),
    Row(runnable, lambda m: m.mem_page_remove(TDR, GFN, 1), "EPT_ENTRY_STATE_INCORRECT|RCX", "tdh_mem_page_remove.c"),
    Row(
        runnable, lambda m: m.mem_page_remove(TDR, GFN + 1, 0), "EPT_ENTRY_STATE_INCORRECT|RCX", "tdh_mem_page_remove.c"
    ),
    # Sizes
    Row(
        large,
        lambda m: m.mem_page_demote(TDR, 0x40000, 1, Pfn(50)),
        "GPA_RANGE_NOT_BLOCKED|RCX",
        "tdh_mem_page_demote.c",
    ),
    Row(large, lambda m: m.mem_page_demote(TDR, 0x40000, 0, Pfn(50)), "OPERAND_INVALID|RCX", "tdh_mem_page_demote.c"),
    Row(
        runnable,
        lambda m: m.mem_page_demote(TDR, GFN, 1, Pfn(50)),
        "EPT_ENTRY_STATE_INCORRECT|RCX",
        "tdh_mem_page_demote.c",
    ),
    Row(runnable, lambda m: m.mem_page_promote(TDR, GFN, 1), "GPA_RANGE_NOT_BLOCKED|RCX", "tdh_mem_page_promote.c"),
    Row(
        added,
        lambda m: m.mem_page_promote(TDR, GFN, 1),
        "EPT_INVALID_PROMOTE_CONDITIONS|RCX",
        "is_sept_page_valid_for_merge",
    ),
    Row(
        large, lambda m: m.mem_page_promote(TDR, 0x40000, 1), "EPT_ENTRY_STATE_INCORRECT|RCX", "tdh_mem_page_promote.c"
    ),
    # Measurement
    Row(added, lambda m: m.mr_extend(TDR, GFN * PAGE_SIZE + 1), "OPERAND_INVALID|RCX", "tdh_mr_extend.c"),
    Row(added, lambda m: m.mr_extend(TDR, 0), "EPT_ENTRY_NOT_PRESENT|RCX", "tdh_mr_extend.c"),
    Row(runnable, lambda m: m.mr_extend(TDR, GFN * PAGE_SIZE), "OP_STATE_INCORRECT", "tdh_mr_extend.c"),
    Row(with_tables, lambda m: m.mr_finalize(TDR), "NO_VCPUS", "tdh_mr_finalize.c"),
    Row(runnable, lambda m: m.mr_finalize(TDR), "OP_STATE_INCORRECT", "tdh_mr_finalize.c"),
    # The end
    Row(runnable, lambda m: m.mng_vpflushdone(TDR), "FLUSHVP_NOT_DONE", "tdh_mng_vpflushdone.c"),
    Row(flushed, lambda m: m.mng_vpflushdone(TDR), "LIFECYCLE_STATE_INCORRECT", "tdh_mng_vpflushdone.c"),
    Row(runnable, lambda m: m.mng_key_freeid(TDR), "LIFECYCLE_STATE_INCORRECT", "tdh_mng_key_freeid.c"),
    Row(flushed, lambda m: m.mng_key_freeid(TDR), "WBCACHE_NOT_COMPLETE", "tdh_mng_key_freeid.c"),
    Row(half_written_back, lambda m: m.mng_key_freeid(TDR), "WBCACHE_NOT_COMPLETE", "tdh_mng_key_freeid.c"),
    Row(runnable, lambda m: m.phymem_cache_wb(0), "NO_HKID_READY_TO_WBCACHE", "tdh_phymem_cache_wb.c"),
    Row(flushed, lambda m: m.mem_page_remove(TDR, GFN, 0), "TD_KEYS_NOT_CONFIGURED", "check_state_map_tdcs_and_lock"),
    Row(flushed, lambda m: m.mng_create(Pfn(2), HKID), "HKID_NOT_FREE", "tdh_mng_create.c"),
    Row(runnable, lambda m: m.phymem_page_reclaim(m.page()), "LIFECYCLE_STATE_INCORRECT", "tdh_phymem_page_reclaim.c"),
    Row(torn_down, lambda m: m.phymem_page_reclaim(TDR), "TD_ASSOCIATED_PAGES_EXIST", "tdh_phymem_page_reclaim.c"),
    Row(
        torn_down, lambda m: m.phymem_page_reclaim(Pfn(99)), "PAGE_METADATA_INCORRECT|RCX", "tdh_phymem_page_reclaim.c"
    ),
)


@pytest.mark.parametrize("row", _ROWS, ids=lambda row: f"{row.before.__name__}-{row.code}")
def test_refused(row: Row) -> None:
    machine = Machine()
    row.before(machine)
    with pytest.raises(FirmwareError) as error:
        row.call(machine)
    assert error.value.code == f"TDX_{row.code}"


def test_a_refused_call_changesnothing() -> None:
    for row in _ROWS:
        if not row.source.startswith("tdh_mem"):
            continue
        machine = Machine()
        row.before(machine)
        before = repr((machine.pamt.__fingerprint__(), machine.tds[TDR].__fingerprint__()))
        with pytest.raises(FirmwareError):
            row.call(machine)
        assert repr((machine.pamt.__fingerprint__(), machine.tds[TDR].__fingerprint__())) == before, row


@pytest.mark.parametrize(
    ("before", "name", "call"),
    [
        (nothing, "TDH.MNG.CREATE", lambda m: m.mng_create(TDR, HKID)),
        (runnable, "TDH.MEM.TRACK", lambda m: m.mem_track(TDR)),
        (runnable, "TDH.MEM.RANGE.BLOCK", lambda m: m.mem_range_block(TDR, GFN, 0)),
        (tracked, "TDH.MEM.PAGE.REMOVE", lambda m: m.mem_page_remove(TDR, GFN, 0)),
        (torn_down, "TDH.PHYMEM.PAGE.RECLAIM", lambda m: m.phymem_page_reclaim(m.page())),
    ],
)
def test_busy_and_then_not(before: Callable[[Machine], None], name: str, call: Callable[[Machine], object]) -> None:
    machine = Machine()
    before(machine)
    machine.busy = name
    with pytest.raises(TdxError) as error:
        call(machine)
    assert error.value.status >> 32 == 0x80000200  # TDX_OPERAND_BUSY: try again
    machine.busy = ""
    call(machine)


def test_a_page_goes_in_and_out() -> None:
    machine = Machine()
    tracked(machine)
    assert machine.mem_page_remove(TDR, GFN, LEVEL_4K) == machine.page()
    machine.mem_page_aug(TDR, GFN, LEVEL_4K, machine.page(), machine.hva())
    assert machine.tds[TDR].sept.leaf(GFN) == (LEVEL_4K, (Sept.PENDING, machine.page(), machine.hva()))
    machine.page_accept(TDR, GFN, LEVEL_4K)
    assert machine.memory.read(PAGE) == b""


def test_a_guest_is_told_the_level_at_which_its_page_is() -> None:
    """tdg_mem_page_accept.c: the level in place of an operand."""
    machine = Machine()
    large(machine)
    with pytest.raises(TdxError) as error:
        machine.page_accept(TDR, 0x40000, LEVEL_4K)
    assert error.value.status == 0xC000_0B0B_0000_0001
    machine.page_accept(TDR, 0x40000, LEVEL_2M)
    with pytest.raises(TdxError) as error:
        machine.page_accept(TDR, 0x40000, LEVEL_2M)
    assert error.value.status == 0x0000_0B0A_0000_0001


def test_a_page_may_be_augmented_before_the_td_runs() -> None:
    """op_state_lookup.c, TDH_MEM_PAGE_AUG_LEAF: the module would, KVM does not."""
    machine = Machine()
    added(machine)
    machine.mem_page_aug(TDR, GFN + 1, LEVEL_4K, machine.page(OTHER), machine.hva(OTHER))
    assert machine.tds[TDR].sept.leaf(GFN + 1) == (LEVEL_4K, (Sept.PENDING, machine.page(OTHER), machine.hva(OTHER)))


def test_a_vcpu_that_left_lets_the_epoch_end() -> None:
    machine = Machine()
    blocked_while_inside(machine)
    machine.vp_exit(TDR, VCPU)
    machine.vp_enter(TDR, VCPU, CPU)  # in the new epoch: it cannot have what was blocked before
    assert machine.mem_page_remove(TDR, GFN, LEVEL_4K) == machine.page()


def test_mrtd_is_the_sha_384_of_the_calls() -> None:
    """128 bytes for each call: its name in 16, the guest address in 8; then the 256 bytes that were measured."""
    machine = Machine()
    added(machine)
    machine.mr_extend(TDR, GFN * PAGE_SIZE)
    gpa = (GFN * PAGE_SIZE).to_bytes(8, "little")
    expected = hashlib.sha384()
    expected.update((b"MEM.PAGE.ADD".ljust(16, b"\0") + gpa).ljust(128, b"\0"))
    expected.update((b"MR.EXTEND".ljust(16, b"\0") + gpa).ljust(128, b"\0"))
    expected.update(b"image".ljust(256, b"\0"))
    assert machine.mr_finalize(TDR) == expected.digest()


def test_demote_and_promote() -> None:
    machine = Machine()
    large(machine)
    machine.page_accept(TDR, 0x40000, LEVEL_2M)
    machine.mem_range_block(TDR, 0x40000, LEVEL_2M)
    machine.mem_track(TDR)
    machine.mem_page_demote(TDR, 0x40000, LEVEL_2M, Pfn(50))
    sept = machine.tds[TDR].sept
    assert len(sept.children(0x40000, LEVEL_2M)) == 512
    assert sept.leaf(0x40005) == (LEVEL_4K, (Sept.MAPPED, machine.page(5), machine.hva(5)))
    machine.mem_range_block(TDR, 0x40000, LEVEL_2M)
    machine.mem_track(TDR)
    assert machine.mem_page_promote(TDR, 0x40000, LEVEL_2M) == (Pfn(50), None)
    assert sept.leaf(0x40005) == (LEVEL_2M, (Sept.MAPPED, machine.page(), machine.hva()))


def test_poison_is_seen_by_the_guest_and_written_over_by_the_module() -> None:
    machine = Machine()
    tracked(machine)
    machine.mem_range_unblock(TDR, GFN, LEVEL_4K)
    machine.td_read(TDR, GFN)
    machine.host_write(machine.page())
    with pytest.raises(MachineCheck):
        machine.td_read(TDR, GFN)
    machine.host_write(machine.page(OTHER))  # the host's own page
    assert machine.poisoned == {machine.page()}


def test_the_tdr_goes_last_and_the_hkid_is_free_before() -> None:
    machine = Machine()
    torn_down(machine)
    machine.mng_create(Pfn(2), HKID)
    for page in [machine.page(), VCPU, *TABLES, *(Pfn(10 + n) for n in range(TDCS_PAGES)), TDR]:
        machine.phymem_page_reclaim(page)
    assert TDR not in machine.tds
    assert list(machine.pamt.entries) == [Pfn(2)]


def test_the_tdcs_has_what_the_host_chose() -> None:
    machine = Machine()
    with_tdcs(machine)
    params = TdParams(attributes=1 << 28, mrconfigid=b"c" * 48, mrowner=b"o" * 48, mrownerconfig=b"w" * 48)
    machine.mng_init(TDR, params)
    assert machine.tds[TDR].params == params


def test_cpuid_of_a_td_is_the_machines_but_for_what_was_chosen() -> None:
    """read_and_set_cpuid_configurations: a configurable bit is as the host says, whatever the machine has."""
    _, _, may, _ = cpuid_configurable()[1, 0]
    aes, movbe = 1 << 25, 1 << 22
    assert may & aes and may & movbe
    answers = cpuid_of(TdParams(cpuid={(1, 0): (0, 0, aes, 0)}))
    native = DEFAULT_CPUID[1, 0]
    assert answers[1, 0] == (native[0], native[1], native[2] & ~may | aes, native[3])
    assert answers[0x8000_0001, 0] == DEFAULT_CPUID[0x8000_0001, 0]


class TestDynamicPamt:
    """Source: tdh_phymem_pamt_add.c, pamt_manager.c."""

    def test_no_pair_no_page(self) -> None:
        machine = Machine(dynamic_pamt=True)
        with pytest.raises(FirmwareError, match="TDX_MISSING_PAMT_PAGE_PAIR"):
            created(machine)
        machine.pamt.add_pair("TDH.PHYMEM.PAMT.ADD", Pfn(0), (Pfn(5000), Pfn(5001)))
        runnable_but_for_memory = with_vcpu
        runnable_but_for_memory(machine)
        with pytest.raises(FirmwareError, match="TDX_MISSING_PAMT_PAGE_PAIR"):
            machine.mem_page_add(TDR, GFN, machine.page(), machine.hva(), None)

    @pytest.mark.parametrize(
        ("region", "pair", "code"),
        [
            (1, (5002, 5003), "OPERAND_INVALID|RCX"),
            (0, (5002, 5003), "HPA_RANGE_NOT_FREE|RCX"),
            (512, (5001, 5003), "PAGE_NOT_FREE|RDX"),
            (512, (5002, 5000), "PAGE_NOT_FREE|R8"),
        ],
    )
    def test_pairs(self, region: int, pair: tuple[int, int], code: str) -> None:
        machine = Machine(dynamic_pamt=True)
        machine.pamt.add_pair("add", Pfn(0), (Pfn(5000), Pfn(5001)))
        with pytest.raises(FirmwareError) as error:
            machine.pamt.add_pair("add", Pfn(region), (Pfn(pair[0]), Pfn(pair[1])))
        assert error.value.code == f"TDX_{code}"

    def test_a_pair_in_use_stays(self) -> None:
        machine = Machine(dynamic_pamt=True)
        machine.pamt.add_pair("add", Pfn(0), (Pfn(5000), Pfn(5001)))
        created(machine)
        with pytest.raises(TdxError, match="TDX_PAMT_PAGE_NOT_EMPTY") as error:
            machine.pamt.remove_pair("remove", Pfn(0))
        assert error.value.status == 0xC000_0306_0000_0000, "and which page of the two has an entry"
        with pytest.raises(FirmwareError, match=r"TDX_NO_PAMT_PAGE_PAIR\|RCX"):
            machine.pamt.remove_pair("remove", Pfn(512))

    def test_what_holds_a_pamt_is_no_page_for_a_td(self) -> None:
        """non_shared_hpa_metadata_check_and_lock, dynamic_pamt_4k_bitmap_get."""
        machine = Machine(dynamic_pamt=True)
        machine.pamt.add_pair("add", Pfn(0), (Pfn(2), Pfn(5001)))
        with pytest.raises(FirmwareError, match=r"TDX_PAGE_METADATA_INCORRECT\|RCX"):
            machine.mng_create(Pfn(2), HKID)

    def test_static_pamt_takes_none(self) -> None:
        with pytest.raises(FirmwareError, match=r"TDX_OPERAND_INVALID\|RAX"):
            Machine().pamt.add_pair("add", Pfn(0), (Pfn(5000), Pfn(5001)))
