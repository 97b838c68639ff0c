"""ABI levels: what the kernel of one age and build has. A level is a file; the code asks for the feature, never for the
name.

`LEVELS` has those that come with guestmem, by name; `read_level` reads one that a user wrote. Numbers in the code are
mainline's of `MAINLINE`; a level says under which number its kernel has the same thing.
"""

from __future__ import annotations

from guestmem.uapi.levels.level import AbiLevel
from guestmem.uapi.levels.read import FUTURE, LEVELS, MAINLINE, read_level

__all__ = ["FUTURE", "LEVELS", "MAINLINE", "AbiLevel", "read_level"]
