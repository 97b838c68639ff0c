"""The firmware's commands in every order, and the launch digest, against the SNP Firmware ABI Specification."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable

import pytest

from guestmem.arch.snp.digest import DIGEST_BYTES, PageType, extend
from guestmem.arch.snp.firmware import POLICY_RESERVED_1, Context, Firmware, SevStatus, correct_cpuid
from guestmem.arch.snp.rmp import Rmp, State, Status
from guestmem.memory import PAGE_SIZE, Pfn

POLICY = POLICY_RESERVED_1
PAGE = bytes(range(256)) * 16

Step = Callable[[Firmware, Context], object]


def start(firmware: Firmware, context: Context) -> object:
    return firmware.launch_start(context, POLICY)


def activate(firmware: Firmware, context: Context) -> object:
    return firmware.activate(context, 1)


def update(firmware: Firmware, context: Context) -> object:
    return firmware.launch_update(context, 0x40, Pfn(5), PageType.NORMAL, PAGE)[0]


def finish(firmware: Firmware, context: Context) -> object:
    return firmware.launch_finish(context)


def decommission(firmware: Firmware, context: Context) -> object:
    return firmware.decommission(context)


ORDERS: list[tuple[list[Step], SevStatus, str]] = [
    ([start], SevStatus.SUCCESS, "8.16 SNP_LAUNCH_START"),
    ([start, start], SevStatus.INVALID_GUEST_STATE, "8.16, GSTATE is not INIT"),
    ([activate], SevStatus.INVALID_GUEST_STATE, "8.11 SNP_ACTIVATE before LAUNCH_START"),
    ([start, activate], SevStatus.SUCCESS, "8.11"),
    ([start, activate, activate], SevStatus.ACTIVE, "8.11, has an ASID"),
    ([update], SevStatus.INVALID_GUEST_STATE, "8.17 SNP_LAUNCH_UPDATE"),
    ([start, update], SevStatus.INACTIVE, "8.17, no ASID"),
    ([start, activate, update], SevStatus.SUCCESS, "8.17"),
    ([start, activate, update, update], SevStatus.INVALID_PAGE_STATE, "8.17, the page is the guest's already"),
    ([finish], SevStatus.INVALID_GUEST_STATE, "8.18 SNP_LAUNCH_FINISH"),
    ([start, finish], SevStatus.INACTIVE, "8.18, no ASID"),
    ([start, activate, finish], SevStatus.SUCCESS, "8.18"),
    ([start, activate, finish, finish], SevStatus.INVALID_GUEST_STATE, "8.18, running"),
    ([start, activate, finish, update], SevStatus.INVALID_GUEST_STATE, "8.17, running"),
    ([decommission], SevStatus.SUCCESS, "8.12 SNP_DECOMMISSION"),
    ([decommission, decommission], SevStatus.INVALID_GUEST, "8.12, no context any more"),
    ([decommission, start], SevStatus.INVALID_GUEST, "8.16, no context any more"),
]


@pytest.mark.parametrize(("steps", "status", "source"), ORDERS)
def test_commands_in_order(steps: list[Step], status: SevStatus, source: str) -> None:
    firmware = new_firmware()
    context = new_context(firmware)
    answers = [step(firmware, context) for step in steps]
    assert answers[-1] is status, source
    assert all(answer is SevStatus.SUCCESS for answer in answers[:-1])


PAGES = [
    (None, SevStatus.INVALID_PAGE_STATE, "8.17: the hypervisor's page"),
    (State(True, 1, 0x40), SevStatus.INVALID_PAGE_STATE, "8.17: not immutable"),
    (State(True, 2, 0x40, immutable=True), SevStatus.INVALID_PAGE_OWNER, "8.17: another ASID"),
    (State(True, 1, 0x41, immutable=True), SevStatus.INVALID_PAGE_OWNER, "8.17: another address"),
    (State(True, 1, 0x200, large=True, immutable=True), SevStatus.INVALID_PAGE_SIZE, "8.17: large"),
]


@pytest.mark.parametrize(("state", "status", "source"), PAGES)
def test_launch_update_looks_at_the_page(state: State | None, status: SevStatus, source: str) -> None:
    firmware = new_firmware(None)
    context = new_context(firmware)
    start(firmware, context)
    activate(firmware, context)
    if state is not None:
        assert firmware._rmp.rmpupdate(Pfn(512), state) is Status.SUCCESS
    assert firmware.launch_update(context, 0x40, Pfn(512), PageType.NORMAL, PAGE)[0] is status, source
    assert context.digest == bytes(DIGEST_BYTES), "nothing was measured"


def test_a_dirty_asid_wants_a_flush() -> None:
    """8.11: SNP_ACTIVATE after SNP_DECOMMISSION of the same ASID, before SNP_DF_FLUSH."""
    firmware = new_firmware()
    first, second = new_context(firmware), new_context(firmware)
    start(firmware, first)
    activate(firmware, first)
    start(firmware, second)
    assert activate(firmware, second) is SevStatus.ASID_OWNED
    firmware.decommission(first)
    assert activate(firmware, second) is SevStatus.DFFLUSH_REQUIRED
    firmware.df_flush()
    assert activate(firmware, second) is SevStatus.SUCCESS


def test_contexts_run_out() -> None:
    """8.10 SNP_GCTX_CREATE."""
    firmware = Firmware(Rmp(4096), contexts=1)
    new_context(firmware)
    assert firmware.gctx_create() is SevStatus.RESOURCE_LIMIT


DIGESTS = [
    (PageType.NORMAL, True, "contents count"),
    (PageType.VMSA, True, "contents count"),
    (PageType.ZERO, False, "contents are zero by definition"),
    (PageType.UNMEASURED, False, "contents do not count"),
    (PageType.SECRETS, False, "firmware's contents"),
    (PageType.CPUID, False, "checked and not measured"),
]


@pytest.mark.parametrize(("page_type", "counts", "why"), DIGESTS)
def test_the_digest_is_the_sha384_of_page_info(page_type: PageType, counts: bool, why: str) -> None:
    """Byte by byte from the layout of PAGE_INFO in 8.17: 0x70 bytes."""
    before = hashlib.sha384(b"before").digest()
    contents = hashlib.sha384(PAGE).digest() if counts else bytes(48)
    info = before + contents + struct.pack("<H", 0x70) + bytes([page_type]) + bytes(5) + struct.pack("<Q", 0x40000)
    assert len(info) == 0x70
    assert extend(before, page_type, 0x40000, PAGE) == hashlib.sha384(info).digest(), why


def test_a_cpuid_page_is_corrected() -> None:
    """8.17: what no processor of this make has goes; so do entries that there is no room for."""
    entry = struct.pack("<IIQQIIIIQ", 1, 0, 0, 0, 7, 8, 0x29, 9, 0)
    page = (struct.pack("<IIQ", 1, 0, 0) + entry).ljust(PAGE_SIZE, b"\0")
    corrected = correct_cpuid(page)
    assert struct.unpack_from("<IIQQIIII", corrected, 16)[5:] == (8, 0x09, 9)
    assert correct_cpuid(corrected) == corrected
    assert struct.unpack_from("<I", correct_cpuid(struct.pack("<I", 65).ljust(PAGE_SIZE, b"\0")))[0] == 64


def new_firmware(state: State | None = State(True, 1, 0x40, immutable=True)) -> Firmware:  # noqa: B008
    rmp = Rmp(4096)
    if state is not None:
        assert rmp.rmpupdate(Pfn(5), state) is Status.SUCCESS
    return Firmware(rmp)


def new_context(firmware: Firmware) -> Context:
    context = firmware.gctx_create()
    assert isinstance(context, Context)
    return context
