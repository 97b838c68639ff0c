"""Whoever says what an interface answers says where that is written: tables of answers have a source in each row."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

import pytest

import tests.arch

_ANSWERS = {"code", "status", "answer", "fault", "met"}


def _tables() -> Iterator[tuple[str, list[str], list[object]]]:
    """The parametrized tests whose rows are an answer of an architecture: name, names of the columns, rows."""
    for module in pkgutil.iter_modules(tests.arch.__path__, "tests.arch."):
        for name, test in vars(importlib.import_module(module.name)).items():
            for mark in getattr(test, "pytestmark", ()) if name.startswith("test_") else ():
                if mark.name != "parametrize":
                    continue
                columns, rows = mark.args[0], list(mark.args[1])
                if isinstance(columns, str):
                    columns = getattr(rows[0], "_fields", (columns,))
                if _ANSWERS & set(columns):
                    yield f"{module.name}.{name}", list(columns), rows


TABLES = list(_tables())


@pytest.mark.parametrize(("columns", "rows"), [table[1:] for table in TABLES], ids=[table[0] for table in TABLES])
def test_every_row_names_its_source(columns: list[str], rows: list[object]) -> None:
    assert "source" in columns
    for row in rows:
        source = tuple(row)[columns.index("source")]  # type: ignore[arg-type, var-annotated]
        assert isinstance(source, str) and len(source) > 3, row


def test_no_architecture_is_left_out() -> None:
    names = " ".join(table[0] for table in TABLES)
    for module in ("snp_firmware", "snp_id_block", "snp_rmp", "tdx_module", "cca_monitor", "pkvm_hypervisor"):
        assert module in names
