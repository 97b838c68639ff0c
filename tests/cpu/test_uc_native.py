"""What is found in the library by behaviour."""

from __future__ import annotations

import pytest

from guestmem.cpu import uc_native


def test_errors_have_words() -> None:
    with pytest.raises(uc_native.UnicornError, match="uc_thing: Invalid argument"):
        uc_native.check(15, "uc_thing")
    uc_native.check(0, "uc_thing")


def test_fault_address_is_found_once_and_cached() -> None:
    offset = uc_native.fault_address_offset()
    assert offset % 8 == 0
    assert uc_native.fault_address_offset() is offset


def test_msr_that_unicorn_has_and_one_that_it_has_not() -> None:
    handle = uc_native.open_handle()
    assert uc_native.msr_read(handle, 0xC000_0080) == 0x500
    assert uc_native.msr_read(handle, 0x1234_5678) == 0
    uc_native.close(handle)
