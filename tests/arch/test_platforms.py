"""What KVM asks, of each architecture whose pages are the guest's only while its tables say so: TDX, CCA, pKVM."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from guestmem.arch import Block, FirmwareError, GuestArchitecture, Platform
from guestmem.arch.cca import CcaGuest, CcaPlatform
from guestmem.arch.pkvm import PkvmPlatform
from guestmem.arch.tdx import NOT_MEASURED, TdxGuest, TdxPlatform
from guestmem.memory import PAGE_SIZE
from guestmem.trace import Refusal
from tests.arch.memory import Pages

GFN = 0x80
New = Callable[..., Platform]
BY_LEAF = pytest.mark.parametrize("new", [TdxPlatform, CcaPlatform])
ALL = pytest.mark.parametrize("new", [TdxPlatform, CcaPlatform, PkvmPlatform])


class Failing:
    """Fails the calls of one name."""

    def __init__(self) -> None:
        self.name = ""

    def __call__(self, name: str) -> bool:
        return name == self.name


def _launched(platform: Platform, number: int = 1) -> GuestArchitecture:
    guest = platform.new_guest(number, 100 + number)
    _launch(guest)
    return guest


def _launch(guest: GuestArchitecture) -> None:
    guest.start()
    guest.finalize({0: b""})


def _convert(guest: GuestArchitecture, block: Block) -> None:
    """As KVM does, to shared."""
    guest.make_shared([block])


def reaches(guest: GuestArchitecture, block: Block, *, trusted: bool) -> bool:
    """Whether a device writes to a block through a leaf of its order."""
    assert guest.dma is not None
    try:
        return guest.dma.check(block, block.pfn, trusted=trusted, write=True)
    except Refusal:
        return False


@ALL
def test_a_page_is_the_guests_and_then_the_hosts(new: New) -> None:
    platform, pages = new(), Pages(2)
    guest, one = _launched(platform), pages.block()
    assert platform.owner(one.pfn) is None
    assert reaches(guest, one, trusted=False)
    guest.make_private(GFN, one)
    assert platform.owner(one.pfn) == (1, 101, GFN)
    assert list(platform.owned()) == [(one.pfn, (1, 101, GFN))]
    assert guest.check_access(GFN, one.pfn, 0, True)
    assert not guest.check_access(GFN + 1, one.pfn, 0, True)
    assert not reaches(guest, one, trusted=False)
    assert reaches(guest, one, trusted=True)
    guest.make_private(GFN, one)  # it is already
    _convert(guest, one)
    assert platform.owner(one.pfn) is None
    assert not guest.check_access(GFN, one.pfn, 0, True)
    assert guest.teardown()


@ALL
def test_nobody_gets_another_guests_page(new: New) -> None:
    platform, pages = new(), Pages(1)
    one, two = _launched(platform), _launched(platform, 2)
    one.make_private(GFN, pages.block())
    with pytest.raises(FirmwareError):
        two.make_private(GFN, pages.block())
    assert platform.owner(pages.block().pfn) == (1, 101, GFN)


@ALL
def test_the_end_gives_everything_back_scrubbed(new: New) -> None:
    platform, pages = new(), Pages(2)
    guest = _launched(platform)
    for number in range(2):
        guest.make_private(GFN + number, pages.block(number))
        pages.write(number, b"secret")
    assert guest.teardown()
    assert list(platform.owned()) == []
    assert [pages.read(0), pages.read(1)] == [b"", b""]
    _launched(platform).make_private(GFN, pages.block())


@ALL
def test_what_leaves_the_file_is_scrubbed(new: New) -> None:
    platform, pages = new(), Pages(1)
    guest = _launched(platform)
    guest.make_private(GFN, pages.block())
    pages.write(0, b"secret")
    guest.invalidate(GFN, 1)
    guest.reclaim(pages.block())
    assert platform.owner(pages.block().pfn) is None
    assert pages.read(0) == b""


@BY_LEAF
def test_the_first_image_is_measured(new: New) -> None:
    digests = set()
    for image, kind in ((b"one", 0), (b"two", 0), (b"one", NOT_MEASURED), (b"two", NOT_MEASURED)):
        platform, pages = new(), Pages(1)
        guest = platform.new_guest(1, 101)
        guest.start()
        guest.populate(GFN, pages.block(), image.ljust(PAGE_SIZE, b"\0"), kind)
        assert pages.read(0) == image
        if kind == 0:
            digests.add(guest.finalize({0: b""}))
        else:
            digests.add(guest.finalize({0: b""})[:8])
    assert len(digests) == 3  # bytes that are not measured make no difference


@BY_LEAF
def test_the_first_image_may_be_in_place(new: New) -> None:
    platform, pages = new(), Pages(1)
    guest = platform.new_guest(1, 101)
    guest.start()
    pages.write(0, b"image")
    guest.populate(GFN, pages.block(), None)
    guest.finalize({0: b""})
    assert guest.check_access(GFN, pages.block().pfn, 0, True)
    assert pages.read(0) == b"image"


@BY_LEAF
def test_order_of_launch(new: New) -> None:
    platform, pages = new(), Pages(1)
    guest = platform.new_guest(1, 101)
    for too_early in (lambda: guest.make_private(GFN, pages.block()), lambda: guest.finalize({})):
        with pytest.raises(FirmwareError):
            too_early()
    guest.start()
    with pytest.raises(FirmwareError):
        guest.start()
    guest.finalize({0: b""})
    for too_late in (lambda: guest.finalize({}), lambda: guest.populate(GFN, pages.block(), None)):
        with pytest.raises(FirmwareError):
            too_late()
    assert platform.owner(pages.block().pfn) is None
    assert guest.teardown()


def test_a_td_without_vcpus_is_not_finalized() -> None:
    guest = TdxPlatform().new_guest(1, 101)
    guest.start()
    with pytest.raises(FirmwareError, match="TDX_NO_VCPUS"):
        guest.finalize({})


@BY_LEAF
def test_large_leaves_are_split_and_merged(new: New) -> None:
    platform, pages = new(), Pages(1024, first=512)
    first = -pages.first % 512
    guest, large = _launched(platform), pages.block(first, 9)
    assert guest.leaf_order(512, large) == 9
    guest.make_private(512, large)
    assert guest.leaf_order(512, large) == 9
    assert guest.check_access(512, large.pfn, 9, True)  # a TD accepts it whole
    guest.split(512, 9)
    assert guest.leaf_order(512, pages.block(first, 9)) == 0
    assert guest.check_access(512 + 5, pages.block(first + 5).pfn, 0, True)
    guest.merge(512, 9)
    assert guest.leaf_order(512, large) == 9
    guest.invalidate(512, 1)  # a part: what remains is the guest's
    assert platform.owner(pages.block(first).pfn) is None
    assert platform.owner(pages.block(first + 1).pfn) == (1, 101, 513)
    guest.invalidate(512, 512)
    assert list(platform.owned()) == []
    assert guest.teardown()


@pytest.mark.parametrize(
    ("new", "call"),
    [
        (TdxPlatform, "TDH.MEM.RANGE.BLOCK"),
        (TdxPlatform, "TDH.MEM.TRACK"),
        (TdxPlatform, "TDH.MEM.PAGE.REMOVE"),
        (CcaPlatform, "RMI_GRANULE_UNDELEGATE"),
    ],
)
def test_a_page_that_does_not_come_back_stays_the_guests(new: New, call: str) -> None:
    failing = Failing()
    platform, pages = new(fails=failing), Pages(2)
    guest = _launched(platform)
    for number in range(2):
        guest.make_private(GFN + number, pages.block(number))
        pages.write(number, b"secret")
    failing.name = call
    with pytest.raises(FirmwareError) as error:
        guest.invalidate(GFN, 2)
    assert error.value.facts["gfn"] == GFN
    assert platform.owner(pages.block().pfn) is not None
    assert not reaches(guest, pages.block(), trusted=False)
    failing.name = ""
    guest.reclaim(pages.block())
    assert pages.read(0) == b""


@pytest.mark.parametrize(
    "call",
    ["TDH.MNG.CREATE", "TDH.MNG.KEY.CONFIG", "TDH.MNG.ADDCX", "TDH.MNG.INIT", "TDH.VP.CREATE", "TDH.VP.INIT"],
)
def test_a_launch_that_fails_leaves_nothing_behind(call: str) -> None:
    failing = Failing()
    failing.name = call
    platform = TdxPlatform(fails=failing)
    guest = platform.new_guest(1, 101)
    with pytest.raises(FirmwareError):
        _launch(guest)
    failing.name = ""
    assert guest.teardown()
    assert platform.lent.count == 0
    assert not platform.module.pamt.entries
    assert _launched(platform).teardown()


@pytest.mark.parametrize(
    "call",
    ["TDH.VP.FLUSH", "TDH.MNG.VPFLUSHDONE", "TDH.PHYMEM.CACHE.WB", "TDH.MNG.KEY.FREEID", "TDH.PHYMEM.PAGE.RECLAIM"],
)
def test_an_end_that_fails_keeps_the_hkid(call: str) -> None:
    failing = Failing()
    platform, pages = TdxPlatform(fails=failing), Pages(1)
    guest = _launched(platform)
    guest.make_private(GFN, pages.block())
    failing.name = call
    assert not guest.teardown()
    assert platform.owner(pages.block().pfn) is not None


def test_dynamic_pamt_pages_come_and_go_with_the_memory() -> None:
    platform, pages = TdxPlatform(), Pages(1)
    guest = _launched(platform)
    idle = platform.lent.count
    guest.make_private(GFN, pages.block())
    assert platform.lent.count == idle + 2 + 3  # a pair, and a table at each of three levels
    guest.invalidate(GFN, 1)
    assert platform.lent.count == idle + 3
    assert guest.teardown()
    assert platform.lent.count == 0


def test_the_host_cannot_read() -> None:
    pages = Pages(1)
    one = pages.block()
    for new in (CcaPlatform, PkvmPlatform):
        platform = new()
        _launched(platform).make_private(GFN, one)
        with pytest.raises(FirmwareError):
            platform.host_read(one.pfn, one.hva)
    tdx = TdxPlatform()
    guest = _launched(tdx)
    guest.make_private(GFN, one)
    pages.write(0, b"secret")
    assert tdx.host_read(one.pfn, one.hva) == bytes(PAGE_SIZE)
    guest.invalidate(GFN, 1)
    pages.write(0, b"not one")
    assert tdx.host_read(one.pfn, one.hva).rstrip(b"\0") == b"not one"


def test_conversion_keeps_bytes_under_pkvm_alone() -> None:
    left = {}
    for new in (TdxPlatform, CcaPlatform, PkvmPlatform):
        platform, pages = new(), Pages(1)
        guest = _launched(platform)
        pages.write(0, b"from the host")
        guest.make_private(GFN, pages.block())
        assert guest.check_access(GFN, pages.block().pfn, 0, False)
        found = pages.read(0)
        pages.write(0, b"from the guest")
        _convert(guest, pages.block())
        left[platform.name] = found, pages.read(0)
        guest.make_private(GFN, pages.block())
    assert left == {"TDX": (b"", b""), "CCA": (b"", b""), "pKVM": (b"from the host", b"from the guest")}


def test_a_pkvm_donation_that_fails_is_undone() -> None:
    failing = Failing()
    platform, pages = PkvmPlatform(fails=failing), Pages(4, first=4)
    one, two = _launched(platform), _launched(platform, 2)
    two.make_private(0, pages.block(2))
    pages.write(0, b"the host's")
    with pytest.raises(FirmwareError, match="-EPERM"):
        one.make_private(GFN, pages.block(0, 2))
    assert [pfn for pfn, _ in platform.owned()] == [pages.block(2).pfn]
    assert pages.read(0) == b"the host's"


def test_a_realm_is_told_that_its_page_was_destroyed() -> None:
    platform, pages = CcaPlatform(), Pages(1)
    guest = _launched(platform)
    assert isinstance(guest, CcaGuest)
    guest.make_private(GFN, pages.block())
    guest.invalidate(GFN, 1)
    assert guest.realm is not None
    assert guest.realm.get(GFN, 3).ripas.value == "RIPAS_DESTROYED"


def test_mrtd() -> None:
    guest = _launched(TdxPlatform())
    assert isinstance(guest, TdxGuest)
    assert guest.td.mrtd is not None
    assert len(guest.td.mrtd) == 48


def test_a_granule_that_stays_delegated_keeps_the_realms_number() -> None:
    failing = Failing()
    platform, pages = CcaPlatform(fails=failing), Pages(1)
    guest = _launched(platform)
    guest.make_private(GFN, pages.block())
    failing.name = "RMI_GRANULE_UNDELEGATE"
    with pytest.raises(FirmwareError):
        guest.invalidate(GFN, 1)
    failing.name = ""
    assert platform.owner(pages.block().pfn) == (1, 101, None)
    assert not guest.teardown()
