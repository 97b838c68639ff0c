"""Whether a program can have a library preloaded."""

from __future__ import annotations

from pathlib import Path

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile

_MAX_INTERPRETERS = 5


def is_static(program: Path) -> bool:
    """True for an ELF program without an interpreter (PT_INTERP), static-pie included. For a script, of what runs it.

    False for what is no program, or cannot be read: exec says what is wrong with it.
    """
    for _ in range(_MAX_INTERPRETERS):
        try:
            with program.open("rb") as file:
                if file.read(2) != b"#!":
                    file.seek(0)
                    return not any(segment["p_type"] == "PT_INTERP" for segment in ELFFile(file).iter_segments())
                words = file.readline(256).split()
        except (OSError, ELFError):
            return False
        if not words:
            return False
        program = Path(words[0].decode(errors="surrogateescape"))
    return False
