"""The expected answers of the golden rows, and which of them may differ.

Source: spec/golden_6_18.md, observed on one Linux 6.18.44 with the PVM back end (neither VMX nor SVM). Its row V46 does
not tell the other flags of that mremap: the kernel says EINVAL to MREMAP_DONTUNMAP without MREMAP_MAYMOVE, whatever
the mapping, and succeeds with it on a guest_memfd. The probe asks both, the second as row V46b.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

TABLE = Path(__file__).parent / "golden_6_18.tsv"


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One question and the answer of the real kernel, in the notation of the table."""

    id: str
    call: str
    arguments: str
    result: str

    @property
    def section(self) -> str:
        return self.id[0]


def _read_table() -> dict[str, Row]:
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    rows = (Row(*line.split("\t")) for line in lines if not line.startswith("#"))
    return {row.id: row for row in rows}


def _each(reason: str, *ids: str) -> dict[str, str]:
    return dict.fromkeys(ids, reason)


ROWS = _read_table()
SECTIONS = list(dict.fromkeys(row.section for row in ROWS.values()))

# One group of the probe, and its rows: a real kernel with shadow paging allocates 16 GiB of reverse maps for this slot
# of 8 TiB less a page (memslot_rmap_alloc), which takes 50 s here and starves whatever else runs. Natively on demand.
SLOW_GROUP = "R.huge"
SLOW_ROWS = {"R42"}

# Rows that show the configuration or the CPU back end of the table's machine and not guest_memfd. That kernel has no
# software-protected VMs, which are what guestmem's private memory is made of at every level. Every guest access went
# through userspace_addr (the table's note on section G), while a VMX or SVM machine of that release uses the file for a
# slot whose file has the MMAP flag (semantics.md, GMEM_ONLY slots). Both answers are right; the difference is printed.
PECULIAR: dict[str, str] = {
    **_each("that kernel is built without CONFIG_KVM_SW_PROTECTED_VM", "C9", "C11", "C14", "K7"),
    **_each("dirty rings, which a kernel may lack, are not built here", "C6"),
    **_each("shadow paging: no KVM_PRE_FAULT_MEMORY; with two-dimensional paging it exists", "C12", "G39", "G43"),
    **_each("the file is gone: that back end makes MMIO of it, others exit with EFAULT", "G12"),
    **_each("that back end cannot reach the file without userspace_addr, others read the file", "G14"),
    **_each("that back end uses the unrelated userspace_addr, others the file", "G16", "G18"),
    **_each(
        "flags=1: that back end fails through userspace_addr, others take the page from the file", "G19", "G20", "G21"
    ),
    **_each(
        "inaccessible userspace_addr: that back end's emulator makes MMIO of it, others EFAULT", "G27", "G36", "G37"
    ),
}

# What no user-space process can imitate: row and reason. A row that agrees all the same must leave this list.
UNIMITABLE: dict[str, str] = {}


def natural_key(row_id: str) -> tuple[int, int, str]:
    """The table's order: by section as listed, then by number."""
    match = re.fullmatch(r"([A-Z])(\d+)(\w*)", row_id)
    if match is None:
        raise ValueError(f"{row_id!r} is no row")
    return SECTIONS.index(match[1]), int(match[2]), match[3]
