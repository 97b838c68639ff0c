"""The layout of a saved context."""

from __future__ import annotations

import ctypes

import pytest

from guestmem.cpu import uc_native
from guestmem.cpu.x86_env import Env, EnvTail, SegmentCache, env_layout


def test_sizes_are_those_of_c() -> None:
    """As gcc lays out CPUX86State on a 64-bit host."""
    assert ctypes.sizeof(SegmentCache) == 24
    assert (Env.eip.offset, Env.hflags.offset, Env.segs.offset, Env.cr.offset) == (128, 176, 184, 424)
    assert Env.efer.offset == 592
    assert (EnvTail.dr.offset, EnvTail.old_exception.offset, EnvTail.v_tpr.offset) == (16, 112, 172)


def test_a_build_with_another_layout_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    env_layout.cache_clear()
    monkeypatch.setattr(uc_native, "context_image", lambda handle, context: bytes(5600))
    with pytest.raises(uc_native.UnicornError, match="layout of uc_context"):
        env_layout()
    monkeypatch.undo()
    assert env_layout().env > 0
