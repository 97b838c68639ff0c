"""`guestmem levels`, and --abi with a file."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from guestmem.cli.main import app
from guestmem.uapi.levels import LEVELS

runner = CliRunner()


def test_the_list_has_every_level() -> None:
    done = runner.invoke(app, ["levels"])
    assert done.exit_code == 0
    assert all(any(line.split()[:1] == [name] for line in done.stdout.splitlines()) for name in LEVELS)


def test_the_difference_is_a_table_of_what_differs_and_no_more() -> None:
    done = runner.invoke(app, ["levels", "v7.4", "v7.4-vm-attributes"])
    assert done.exit_code == 0
    rows = [line.split("  ") for line in done.stdout.splitlines()[1:]]
    assert [row[0].strip() for row in rows] == [
        "conversion",
        "VM types",
        "KVM_SET_MEMORY_ATTRIBUTES2",
        "KVM_SET_MEMORY_ATTRIBUTES",
    ]
    assert "0xc080aed2" in done.stdout


def test_of_one_level_all_is_told() -> None:
    done = runner.invoke(app, ["levels", "future"])
    assert done.exit_code == 0
    said = {line.split()[0] for line in done.stdout.splitlines()[1:]}
    level = LEVELS["future"]
    tables = {"CAP_": level.capabilities, "": level.ioctls, "MEM_": level.region_flags}
    assert said >= {f"KVM_{prefix}{name}" for prefix, table in tables.items() for name in table}
    assert said >= {f"GUEST_MEMFD_FLAG_{name}" for name in level.create_flags}


def test_a_mistake_in_a_file_ends_each_command_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "fork.toml"
    path.write_text('base = "v7.3"\n[flags.guest_memfd]\nHUGETLB = 0\n')
    for command in (["levels", str(path)], ["run", "--abi", str(path), "--", "true"]):
        done = runner.invoke(app, command)
        assert done.exit_code in (2, 125)
        assert f"[level.same_bit] at {path}:3" in done.stderr


def test_a_name_that_is_no_level_says_which_there_are() -> None:
    for name in ("v5.0", "none"):
        for command, code in ((["run", "--abi", name, "--", "true"], 125), (["levels", name], 2)):
            done = runner.invoke(app, command)
            assert done.exit_code == code
            assert f"[level.not_found] at {name}" in done.stderr and "v7.4-vm-attributes" in done.stderr
