"""Attributes against a plain list, and at sizes where a plain list cannot be."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from guestmem.memory.attributes import REGION, Attributes, other
from guestmem.memory.notifier import Access
from guestmem.memory.pages import Range

accesses = st.sampled_from(list(Access))


@given(accesses, st.integers(1, 200), st.data())
def test_attributes_are_a_list_of_accesses(birth: Access, count: int, data: st.DataObject) -> None:
    attributes: Attributes[int] = Attributes(count, birth)
    reference = [birth] * count
    for _ in range(data.draw(st.integers(0, 12))):
        start = data.draw(st.integers(0, count - 1))
        end = data.draw(st.integers(start + 1, count))
        access = data.draw(accesses)
        attributes.set(Range(start, end), access)
        reference[start:end] = [access] * (end - start)
    assert [attributes.get(number) for number in range(count)] == reference
    runs = list(attributes.runs(Range(0, count)))
    assert [access for run, access in runs for _ in range(run.pages)] == reference
    assert all(before[1] is not after[1] for before, after in pairwise(runs)), "runs are maximal"
    assert attributes.private_count() == reference.count(Access.PRIVATE)
    start = data.draw(st.integers(0, count - 1))
    end = data.draw(st.integers(start + 1, count))
    assert attributes.is_uniform(Range(start, end)) == (len(set(reference[start:end])) == 1)
    for access in Access:
        assert attributes.is_all(Range(start, end), access) == (set(reference[start:end]) == {access})


@settings(max_examples=40, deadline=None)
@given(accesses, st.data())
def test_regions_of_sixteen_terabytes_are_seamless(birth: Access, data: st.DataObject) -> None:
    """The same in blocks around the borders of regions, where wholly changed regions are kept as one bit."""
    unit = REGION // 4
    count = 13 * unit
    attributes: Attributes[int] = Attributes(count, birth)
    reference = [birth] * 13
    for _ in range(data.draw(st.integers(1, 6))):
        start = data.draw(st.integers(0, 12))
        end = data.draw(st.integers(start + 1, 13))
        access = data.draw(accesses)
        attributes.set(Range(start * unit, end * unit), access)
        reference[start:end] = [access] * (end - start)
    for place, access in enumerate(reference):
        assert attributes.is_all(Range(place * unit, (place + 1) * unit), access)
        assert attributes.get(place * unit) is attributes.get((place + 1) * unit - 1) is access
    runs = [(run.start // unit, run.end // unit, access) for run, access in attributes.runs(Range(0, count))]
    assert [access for start, end, access in runs for _ in range(end - start)] == reference
    assert attributes.private_count() == reference.count(Access.PRIVATE) * unit


def test_the_largest_file_converts_wholly_in_no_space() -> None:
    count = (1 << 51) - 1
    attributes: Attributes[int] = Attributes(count, Access.PRIVATE)
    attributes.set(Range(0, count), Access.SHARED)
    attributes.set(Range(7, count - 3), Access.PRIVATE)
    runs = [(run.start, run.end) for run, _ in attributes.runs(Range(0, count))]
    assert runs == [(0, 7), (7, count - 3), (count - 3, count)]
    assert attributes.size_bytes() < 4096


def test_other_is_an_involution() -> None:
    assert all(other(other(access)) is access is not other(access) for access in Access)
