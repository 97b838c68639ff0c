"""Schedules and their tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestmem.check.choices import FAIL, PASS, Schedule, parse

choices = st.lists(st.sampled_from([*range(5), FAIL, PASS]), max_size=40).map(bytes)


@given(choices, choices)
def test_a_token_says_all_of_a_schedule(path: bytes, cycle: bytes) -> None:
    assert parse(Schedule(path, cycle).token()) == Schedule(path, cycle)


def test_a_token_is_short() -> None:
    assert Schedule(b"\0\0\0\1\xff\0").token() == "a3b!a"
    assert Schedule(b"\0", b"\1\2").token() == "a(bc)"
    assert Schedule(b"\0\0\1\xff").steps == 3


@pytest.mark.parametrize("token", ["A", "a-", "a(b", "(b)c", "3a", "a b"])
def test_what_is_no_token_is_refused(token: str) -> None:
    with pytest.raises(ValueError, match="no schedule"):
        parse(token)
