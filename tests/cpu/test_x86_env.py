"""Where the CPU lies in memory."""

from __future__ import annotations

import ctypes

import pytest

from guestmem.cpu import uc_native
from guestmem.cpu.x86_env import Env, EnvMsrs, EnvTail, PassEnd, SegmentCache, layout


def test_sizes_are_those_of_c() -> None:
    """As gcc lays out CPUX86State on a 64-bit host."""
    assert ctypes.sizeof(SegmentCache) == 24
    assert (Env.eip.offset, Env.hflags.offset, Env.segs.offset, Env.cr.offset) == (128, 176, 184, 424)
    assert Env.efer.offset == 592
    assert (EnvMsrs.star.offset, EnvMsrs.xcr0.offset, PassEnd.exception_index.offset) == (24, 104, 8)
    assert (EnvTail.dr.offset, EnvTail.old_exception.offset, EnvTail.v_tpr.offset) == (16, 112, 172)


def test_it_is_found_once_and_the_same_again() -> None:
    found = layout()
    assert layout() is found
    layout.cache_clear()
    assert layout() == found


@pytest.mark.parametrize(
    ("name", "wrong", "why"),
    [
        ("handle_image", lambda handle: bytes(15000), "the CPU behind a handle"),
        ("context_size", lambda handle: 5000, "the CPU behind a handle"),
        ("msr_read", lambda handle, index: 1, "EFER"),
        ("emu_start", lambda *arguments: 0, "CPUState.halted"),
    ],
)
def test_a_build_with_another_layout_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, wrong: object, why: str
) -> None:
    uc_native.fault_address_offset()
    layout.cache_clear()
    monkeypatch.setattr(uc_native, name, wrong)
    with pytest.raises(uc_native.UnicornError, match=f"layout of {why}"):
        layout()
    monkeypatch.undo()
    assert layout().env > 0
