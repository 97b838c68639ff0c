"""A level is a file: what it may say, and that every mistake is told with file, line and rule."""

from __future__ import annotations

import errno
import itertools
from pathlib import Path

import pytest

from guestmem.trace import Refusal
from guestmem.uapi.kvm import VmType
from guestmem.uapi.levels import LEVELS, MAINLINE, AbiLevel, read_level


def level_of(tmp_path: Path, text: str) -> AbiLevel:
    path = tmp_path / "fork.toml"
    path.write_text(text)
    return read_level(path)


def test_a_fork_moves_flags_numbers_and_calls_of_its_base(tmp_path: Path) -> None:
    text = """\
base = "v7.3"
about = "a fork"

[flags.guest_memfd]
INIT_SHARED = 4

[capabilities]
PPC_COMPAT_CAPS = false
GUEST_MEMFD_FLAGS = 250
FORKS_OWN = 299

[answers]
FORKS_OWN = 7

[ioctls]
PRE_FAULT_MEMORY = false
CREATE_GUEST_MEMFD = 0xC040AEF0
"""
    level, base = level_of(tmp_path, text), LEVELS["v7.3"]
    assert level.name == "fork"
    assert level.create_flags == {"MMAP": 1, "INIT_SHARED": 1 << 4}
    assert (level.capability(250), level.capability(244), level.capability(299)) == (
        "GUEST_MEMFD_FLAGS",
        None,
        "FORKS_OWN",
    )
    assert level.request(0xC040AEF0) == base.request(0xC040AED4) == 0xC040AED4
    assert level.request(0xC040AED4) is None
    assert level.request(0xC040AED5) is None
    assert level.request(0xAE80) == 0xAE80, "KVM_RUN is nobody's choice"
    assert level.overlap_errno == base.overlap_errno == errno.EEXIST


MISTAKES = [
    ("level.syntax", 2, 'base = "v7.3"\nabout = nothing\n'),
    ("level.field", 3, 'base = "v7.3"\n[guest_memfd]\nin_plaice = true\n'),
    ("level.field", 3, 'base = "v7.3"\n[checks]\nsigned_range_end = "no"\n'),
    ("level.field", 1, "base = 7\n"),
    ("level.base", 1, 'base = "v5.0"\n'),
    ("level.value", 3, 'base = "v7.3"\n[capabilities]\nGUEST_MEMFD_FLAGS = "244"\n'),
    ("level.value", 3, 'base = "v7.3"\n[capabilities]\nGUEST_MEMFD_FLAGS = true\n'),
    ("level.value", 3, 'base = "v7.3"\n[flags.guest_memfd]\nMMAP = 64\n'),
    ("level.value", 3, 'base = "v7.3"\n[flags.guest_memfd]\nINIT_SHARED = 58\n'),
    ("level.value", 3, 'base = "v7.3"\n[flags.memory_region]\nUSERFAULT = 32\n'),
    ("level.value", 3, 'base = "v7.3"\n[capabilities.FOO]\nx = 5\n'),
    ("level.same_bit", 3, 'base = "v7.3"\n[flags.memory_region]\nUSERFAULT = 1\n'),
    ("level.unknown", 4, 'base = "v7.3"\n\n[flags.guest_memfd]\nMNAP = 5\n'),
    ("level.unknown", 2, 'base = "v7.3"\nvm_types = ["DEFAULT", "SVE"]\n'),
    ("level.unknown", 3, 'base = "v7.3"\n[ioctls]\nCREATE_GUEST_MEMDF = 1\n'),
    ("level.unknown", 3, 'base = "v7.3"\n[checks]\noverlap_errno = "EPERM"\n'),
    ("level.unknown", 3, 'base = "v7.3"\n[answers]\nNO_SUCH_CAPABILITY = 1\n'),
    ("level.same_number", 3, 'base = "v7.3"\n[capabilities]\nGUEST_MEMFD_MEMORY_ATTRIBUTES = 250\n'),
    ("level.same_request", 3, 'base = "v7.3"\n[ioctls]\nLINK_GUEST_MEMFD = 0xC040AED4\n'),
    ("level.same_bit", 4, 'base = "v7.3"\n[flags.guest_memfd]\nHUGETLB = 2\nINIT_SHARED = 2\n'),
    ("level.in_place_without_mmap", 3, 'base = "v6.12"\n[guest_memfd]\nin_place = true\n'),
    ("level.in_place_without_ioctl", 3, 'base = "v7.3"\n[guest_memfd]\nin_place = true\n'),
    ("level.in_place_without_ioctl", 3, 'base = "v7.4"\n[guest_memfd]\nin_place = false\n'),
    ("level.no_conversion", 2, 'base = "v7.3"\nvm_types = ["SNP"]\n[ioctls]\nSET_MEMORY_ATTRIBUTES = false\n'),
]


@pytest.mark.parametrize(("rule", "line", "text"), MISTAKES)
def test_a_mistake_is_refused_with_file_and_line(tmp_path: Path, rule: str, line: int, text: str) -> None:
    with pytest.raises(Refusal) as caught:
        level_of(tmp_path, text)
    assert (caught.value.errno, caught.value.rule) == (errno.EINVAL, rule)
    assert caught.value.facts["at"] == f"{tmp_path / 'fork.toml'}:{line}", str(caught.value)


def test_without_a_base_everything_must_be_said(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"level\.incomplete.*vm_types.*checks\.overlap_errno"):
        level_of(tmp_path, 'about = "nothing else"\n')


def test_a_file_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"ENOENT \[level\.not_found\]"):
        read_level(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(Refusal, match=r"EINVAL \[level\.syntax\]"):
        read_level(tmp_path / "binary.toml")


def test_a_contradiction_says_where_the_other_half_stands(tmp_path: Path) -> None:
    with pytest.raises(Refusal) as caught:
        level_of(tmp_path, 'base = "v7.4"\n[flags.guest_memfd]\nMMAP = false\n')
    assert caught.value.rule == "level.in_place_without_mmap"
    assert caught.value.facts["removed_at"] == f"{tmp_path / 'fork.toml'}:3"
    assert str(caught.value.facts["at"]).startswith("v7.4.toml:")


def test_every_level_that_comes_with_guestmem_is_sound() -> None:
    for name, level in LEVELS.items():
        assert level.name == name
        assert VmType.DEFAULT in level.vm_types
        assert set(level.capabilities) <= {*MAINLINE, "USERFAULT"}
        assert all(level.capability(number) == name for name, number in level.capabilities.items())


def test_numbers_of_later_levels_are_those_of_the_earlier_ones() -> None:
    """Mainline never moves a number once it is in a release."""
    names = list(LEVELS)
    for earlier, later in itertools.pairwise(names):
        assert LEVELS[earlier].capabilities.items() <= LEVELS[later].capabilities.items()
