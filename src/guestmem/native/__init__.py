"""The shim: a library in C that `guestmem run` preloads into a client. Sources and library lie in this directory."""

from __future__ import annotations

from pathlib import Path

__all__ = ["shim_path"]

_SHIM = "libguestmem_shim.so"


def shim_path() -> Path | None:
    """The library, or None where guestmem was installed without a compiler."""
    path = Path(__file__).with_name(_SHIM)
    return path if path.exists() else None
