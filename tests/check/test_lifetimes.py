"""The policies of lifetime, compared: the report is what the documentation has."""

from __future__ import annotations

import re
from pathlib import Path

from typer.testing import CliRunner

from guestmem.arch import Lifetime
from guestmem.check.lifetimes import ask
from guestmem.check.scenario import built_in
from guestmem.cli.main import app
from guestmem.uapi.kvm import VmType

PAGE = Path(__file__).parents[2] / "docs/arch/lifetime.md"


def test_the_tables_in_the_docs_are_the_report() -> None:
    """Source: spec/seed.md section 6, spec/semantics.md section 12."""
    done = CliRunner().invoke(app, ["check", "--lifetimes"])
    assert done.exit_code == 0, done.output
    tables = re.findall(r"^\|.*?\|$(?=\n\n)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert done.output.strip().split("\n\n") == tables[:2]


def test_calls_are_counted_along_every_way_to_a_state() -> None:
    """A guest may or may not come back between two bindings, and be given its page a second time."""
    seen = ask(built_in()["lifetime_rebind"], Lifetime.BINDING, VmType.SNP)
    assert (seen.calls, seen.left, seen.strayed) == ({1, 2}, {0, 1}, set())


def test_a_scenario_under_another_policy() -> None:
    for arguments, code in ((["--lifetime", "folio"], 0), ([], 0)):
        assert CliRunner().invoke(app, ["check", "lifetime_rebind_elsewhere", *arguments]).exit_code == code
