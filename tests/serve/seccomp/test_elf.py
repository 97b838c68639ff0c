"""Which programs are static."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from guestmem.serve.seccomp.elf import is_static


@pytest.mark.parametrize(
    ("kind", "expected"), [("-static", True), ("-static-pie", True), ("-pie", False), ("-no-pie", False)]
)
def test_by_its_interpreter(kind: str, expected: bool, build_static: Callable[..., Path]) -> None:
    assert is_static(build_static("killed", kind)) is expected


def test_a_script_is_what_runs_it(tmp_path: Path, build_static: Callable[..., Path]) -> None:
    script, wrapper = tmp_path / "script", tmp_path / "wrapper"
    script.write_text(f"#! {build_static('killed')} -x\n")
    wrapper.write_text(f"#!{script}\n")
    assert is_static(script) and is_static(wrapper)
    script.write_text("#!/bin/sh\n")
    assert is_static(wrapper) is is_static(Path("/bin/sh"))


@pytest.mark.parametrize("content", [b"", b"#!", b"#!\n", b"text", b"\x7fELF"])
def test_no_program_is_not_static(content: bytes, tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_bytes(content)
    assert not is_static(program)


def test_a_program_that_is_not_there_is_not_static(tmp_path: Path) -> None:
    assert not is_static(tmp_path / "none")


def test_a_script_that_runs_itself_ends(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text(f"#!{script}\n")
    assert not is_static(script)
