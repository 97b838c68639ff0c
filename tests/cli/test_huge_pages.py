"""Huge pages on the command line."""

from __future__ import annotations

import pytest

from guestmem.cli.huge_pages import page_counts, policy_of, shortages
from guestmem.memory import HugePolicy
from guestmem.memory.interface import Conversion, Split
from guestmem.memory.pages import ORDER_1G, ORDER_2M


def test_counts_are_by_size() -> None:
    assert page_counts("2M=512,1G=4") == {ORDER_2M: 512, ORDER_1G: 4}
    assert page_counts("1G=0") == {ORDER_1G: 0}
    assert page_counts("") == {}


@pytest.mark.parametrize("text", ["4K=1", "2M", "2M=", "2M=-1", "2M=x", "2M=1,2M=2", "2M=1;1G=1", "=3", "2m=1"])
def test_other_counts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a number of huge pages"):
        page_counts(text)


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("lazy,atomic", HugePolicy()),
        ("stepwise", HugePolicy(Split.LAZY, Conversion.STEPWISE)),
        ("whole", HugePolicy(Split.WHOLE, Conversion.ATOMIC)),
        ("stepwise,whole", HugePolicy(Split.WHOLE, Conversion.STEPWISE)),
    ],
)
def test_a_policy_has_one_word_of_each_kind(text: str, policy: HugePolicy) -> None:
    assert policy_of(text) == policy


@pytest.mark.parametrize("text", ["", "lazy,whole", "atomic,atomic", "greedy", "lazy,atomic,stepwise", "lazy,"])
def test_other_policies_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a policy"):
        policy_of(text)


def test_what_the_machine_has_not_is_said() -> None:
    said = list(shortages({ORDER_2M: 8, ORDER_1G: 2}, {ORDER_2M: 8, ORDER_1G: 1}))
    assert said == ["of 2 huge pages of 1G this machine could set aside 1"]
