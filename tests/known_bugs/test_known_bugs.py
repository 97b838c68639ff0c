"""Each known bug whose code exists is found by the scenarios, by a property that it breaks."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from guestmem.check import mutants
from guestmem.check.scenario import built_in
from guestmem.check.work import Options, hunt
from tests.known_bugs.not_covered import NOT_COVERED

HERE = Path(__file__).parent
MUTANTS = {name: mutants.find(name) for name in mutants.in_folder(HERE)}
NUMBERS = [
    *(1, 2, 4, 5, 7, 8, 9, 10, 11, 12, 13, 15, 16, 17, 18, 19, 22, 23, 24, 26, 27, 29, 30, 32, 33),  # core
    *(35, 36, 37, 39, 40),  # library and other layouts
    *(41, 43, 44, 45, 47, 49, 50, 51, 53),  # SNP, TDX
    *(55, 57, 59, 60, 62, 63, 65, 67, "68b", 69, 72),  # IOMMU, VMMs, huge pages
]
"""The entries of known_bugs.md."""

OWN = {*(f"H{number:02}" for number in range(1, 13)), "V01", "V02", "W01", "W02", "W03"}
"""What postings leave open, or do in an order that can fail, and what all rests on: each told in its mutant's file."""

UPSTREAM = {f"U{number:02}" for number in range(1, 9)}
"""Fixed upstream since the catalogue was made (upstream_2026_11.md)."""


@pytest.mark.parametrize("name", MUTANTS, ids=lambda name: name.rpartition(":")[2])
def test_found_by_a_property_that_it_breaks(name: str) -> None:
    hunted = hunt(name, list(built_in()), Options())
    assert hunted.found
    assert hunted.expected, f"{hunted.property} in {hunted.scenario}: {hunted.facts}"
    assert hunted.property in MUTANTS[name].breaks
    assert hunted.schedule is not None, "without steps, if it breaks while the scenario is set up"


def test_b55_on_a_td_resets_the_machine() -> None:
    """Elsewhere S1 is broken first, which is a look into tables; here nobody looks, and it shows by itself."""
    hunted = hunt(str(HERE / "b55_iommu_is_not_told.py"), ["td_stray_dma"], Options())
    assert (hunted.found, hunted.property) == (True, "MC")
    assert "dma.machine_check" in hunted.facts


def test_every_entry_of_the_catalogue_is_a_mutant_or_says_what_it_waits_for() -> None:
    entries = {f"B{number:02d}" if isinstance(number, int) else f"B{number}" for number in NUMBERS}
    covered = {each.bug for each in MUTANTS.values()}
    assert covered.isdisjoint(NOT_COVERED)
    assert covered | set(NOT_COVERED) == entries | OWN | UPSTREAM


def test_a_file_each_named_after_its_entry() -> None:
    for name, each in MUTANTS.items():
        file = Path(name.rpartition(":")[0])
        assert re.fullmatch(rf"{each.bug.lower()}_\w+", file.stem), file
        assert each.summary, f"{file.name} does not say what is wrong"


@pytest.mark.parametrize("each", MUTANTS.values(), ids=lambda each: each.name)
def test_the_original_is_back_afterwards(each: mutants.Mutant) -> None:
    module_name, _, path = each.replaces.partition(":")

    def present() -> object:
        found: object = importlib.import_module(module_name)
        for part in path.split("."):
            found = getattr(found, part)
        return found

    before = present()
    with each.installed():
        assert present() is each.function
    assert present() is before
