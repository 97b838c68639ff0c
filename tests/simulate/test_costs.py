"""The cost model as a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from guestmem.simulate.costs import DEFAULTS, FIRST_TOUCHES, default_costs, load
from guestmem.trace import Refusal


def test_what_is_shown_can_be_loaded(tmp_path: Path) -> None:
    path = tmp_path / "costs.toml"
    path.write_text(default_costs().text())
    assert load(path) == default_costs()


def test_every_item_has_a_source_that_says_what_it_is_worth() -> None:
    for cost in DEFAULTS.values():
        assert "assumption" in cost.source or cost.source.startswith("measured")
    assert set(FIRST_TOUCHES) < set(DEFAULTS)


def test_a_part_of_it_keeps_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "costs.toml"
    path.write_text('[flush]\nns = 12.5\nsource = "mine"\n[tlb]\nentries = 64\n')
    costs = load(path)
    assert (costs.items["flush"].ns, costs.items["flush"].source, costs.tlb_entries) == (12.5, "mine", 64)
    assert costs.items["zap"] == DEFAULTS["zap"]
    assert costs.total({"flush": 4, "zap": 1}) == {"flush": 50.0, "zap": DEFAULTS["zap"].ns}


@pytest.mark.parametrize(
    "text",
    [
        "flush",
        "[flush",
        "flush = 3",
        "[flash]\nns = 1",
        "[flush]",
        "[flush]\nns = -1",
        '[flush]\nns = "1"',
        "[flush]\nns = true",
        "[flush]\nns = nan",
        "[flush]\nns = inf",
        "[flush]\nus = 1",
        "[flush]\nns = 1\nus = 1",
        "[tlb]\nns = 1",
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "costs.toml"
    path.write_text(text)
    with pytest.raises(Refusal, match=r"costs\.file"):
        load(path)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "costs.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(Refusal, match=r"costs\.file"):
        load(path)
