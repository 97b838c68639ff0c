"""The MSR filter: which range decides, and where an engine has to stop for it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from guestmem.kvm.msr_filter import MAX_BITMAP, MAX_RANGES, READ, WRITE, MsrFilter, MsrRange

X2APIC = range(0x800, 0x900)


def test_without_ranges_it_is_no_filter() -> None:
    assert MsrFilter().allows(0x174, write=True)
    assert MsrFilter().stops() == ()


def test_the_first_range_that_is_for_the_access_decides() -> None:
    both = MsrFilter((MsrRange(READ, 0x174, 2, b"\1"), MsrRange(READ | WRITE, 0x174, 2, b"\2")))
    assert [both.allows(0x174, write) for write in (False, True)] == [True, False]
    assert [both.allows(0x175, write) for write in (False, True)] == [False, True]
    assert both.allows(0x176, write=False)


def test_x2apic_registers_are_not_filtered() -> None:
    deny = MsrFilter((MsrRange(READ, 0x174, 1, b"\1"),), allow_by_default=False)
    assert deny.allows(0x800, write=True)
    assert not any(0x800 in stops for stops in deny.stops())
    assert all(any(index in stops for stops in deny.stops()) for index in (0, 0x175, 0x7FF, 0x900, 0xFFFF_FFFF))


ranges = st.builds(
    lambda flags, first, bits: MsrRange(flags, first, len(bits) * 8, bytes(bits)),
    st.sampled_from([READ, WRITE, READ | WRITE]),
    st.integers(0x7F0, 0x910),
    st.lists(st.integers(0, 255), min_size=1, max_size=16),
)


@given(st.lists(ranges, max_size=4), st.booleans())
def test_an_engine_stops_wherever_something_is_denied(chosen: list[MsrRange], allow: bool) -> None:
    """So nothing denied is executed; what is stopped at besides is allowed and done by KVM. An engine has 32 ranges."""
    filter_ = MsrFilter(tuple(chosen), allow)
    stops = filter_.stops()
    assert len(stops) <= 12
    for index in range(0x7E0, 0xA00):
        denied = not (filter_.allows(index, False) and filter_.allows(index, True))
        assert not denied or any(index in stop for stop in stops), hex(index)


@given(st.lists(st.integers(0x100, 0x400), min_size=1, max_size=10, unique=True))
def test_few_denied_registers_are_stopped_at_exactly(denied: list[int]) -> None:
    bitmap = bytearray(b"\xff" * 128)
    for index in denied:
        bitmap[(index - 0x100) >> 3] &= ~(1 << (index - 0x100 & 7))
    stops = MsrFilter((MsrRange(READ, 0x100, 1024, bytes(bitmap)),)).stops()
    assert sorted(index for stop in stops for index in stop) == sorted(denied)


def test_the_widest_gaps_stay_where_there_are_too_many() -> None:
    """The largest filter that there can be, with every second register denied: as fast as it is read."""
    alternating = bytes([0x55]) * MAX_BITMAP
    ranges = tuple(MsrRange(READ, place << 20, MAX_BITMAP * 8, alternating) for place in range(MAX_RANGES))
    stops = MsrFilter(ranges).stops()
    assert len(stops) == 12
    assert [stop.start for stop in stops] == [(place << 20) + 1 for place in range(12)]
    ends = [(place << 20) + MAX_BITMAP * 8 for place in (*range(11), MAX_RANGES - 1)]
    assert [stop.stop for stop in stops] == ends
