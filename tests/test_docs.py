"""The documentation is true: each python block runs, and prints what stands below it."""

from __future__ import annotations

import contextlib
import errno
import io
import pathlib
import re

import pytest

from guestmem.check.invariants import NOT_YET, PROPERTIES
from guestmem.sched import LockClass
from guestmem.uapi.levels import LEVELS, read_level

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [
    "README.md",
    "docs/tutorial.md",
    "docs/how-to.md",
    "docs/arch/explanation.md",
    "docs/iommu/how-to.md",
    "docs/link/how-to.md",
]
BLOCKS = re.compile(r"```python\n(?P<code>.*?)```\n(?:\n```text\n(?P<output>.*?)```\n)?", re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_prints_what_the_page_says(page: str) -> None:
    names: dict[str, object] = {"__name__": "docs"}
    blocks = list(BLOCKS.finditer((ROOT / page).read_text()))
    assert blocks
    for block in blocks:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(block["code"], page, "exec"), names)
        assert out.getvalue() == (block["output"] or "")


def test_the_reference_lists_the_properties_as_they_are() -> None:
    rows = dict(re.findall(r"^\| (S\d+) \| (.*?) \| ", (ROOT / "docs/reference.md").read_text(), re.MULTILINE))
    assert set(rows) == {f"S{number}" for number in range(1, 22)}
    for name, prop in PROPERTIES.items():
        assert rows[name] == prop.statement
    for name in NOT_YET:
        assert re.search(rf"^\| {name} \|.*\| not yet", (ROOT / "docs/reference.md").read_text(), re.MULTILINE)


def test_the_reference_lists_the_levels_as_they_are() -> None:
    text = (ROOT / "docs/reference.md").read_text()
    for level in LEVELS.values():
        errno_name = errno.errorcode[level.overlap_errno]
        cells = [level.mmap, level.in_place, errno_name, level.signed_range_end, level.prepare_before_overlap]
        row = " | ".join({True: "yes", False: "no"}.get(cell, str(cell)) for cell in cells)  # type: ignore[call-overload]
        assert f"| {level.name} | {row} |" in text


def test_every_level_in_the_docs_is_one(tmp_path: pathlib.Path) -> None:
    files = re.findall(r"```toml\n(.*?)```", (ROOT / "docs/run/how-to.md").read_text(), re.DOTALL)
    levels = []
    for text in files:
        path = tmp_path / "fleet.toml"
        path.write_text(text)
        levels.append(read_level(path))
    fleet, firecracker = levels
    assert (fleet.in_place, fleet.capability(250)) == (True, "GUEST_MEMFD_MEMORY_ATTRIBUTES")
    assert fleet.answers == {"FLEET_REVISION": 7}
    assert (firecracker.capability(245), firecracker.region_flags) == ("USERFAULT", {"USERFAULT": 1 << 3})


def test_the_lock_order_is_printed_in_order() -> None:
    text = (ROOT / "docs/reference.md").read_text().split("## Lock order")[1].lower().replace("\n", " ")
    names = ["kvm->lock", "vcpu->mutex", *(name.replace("_", " ") for name in ("folio_lock",))]
    assert all(name in text for name in names)
    places = [text.index(lock.name.lower()) for lock in LockClass if lock.name.lower() in text]
    assert places == sorted(places)
    assert len(places) >= 5


def test_every_folder_of_the_map_exists() -> None:
    for path in re.findall(r"^\| `(src/[^`]+)`", (ROOT / "README.md").read_text(), re.MULTILINE):
        assert (ROOT / path).exists(), path
    rooms = {path.name for path in (ROOT / "src/guestmem").iterdir() if path.is_dir() and path.name != "__pycache__"}
    mapped = set(re.findall(r"`src/guestmem/(\w+)`", (ROOT / "README.md").read_text()))
    assert rooms == mapped
