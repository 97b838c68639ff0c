"""Reading a level: a TOML file, and the levels that it names as its base.

tomllib says where a file is no TOML, msgspec what has the wrong name or type; `Places` knows the line of every key, so
that whatever is wrong is told with file and line. Numbers are the file's own: `false` takes an inherited entry away.
"""

from __future__ import annotations

import errno
import functools
import re
import tomllib
from collections.abc import Iterator, Mapping
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import msgspec

from guestmem.trace import Refusal
from guestmem.uapi.kvm import VmType
from guestmem.uapi.levels import contradictions
from guestmem.uapi.levels.level import AbiLevel
from guestmem.uapi.levels.places import Places

_FILES = resources.files(__name__.rpartition(".")[0])
_NAMES = ("v6.12", "v6.18", "v7.3", "v7.4", "v7.4-vm-attributes", "future")
_AT = re.compile(r"^(?P<what>.*?)(?: - at `\$\.?(?P<path>[^`]*)`)?$")


class _GuestMemfd(msgspec.Struct, forbid_unknown_fields=True):
    in_place: bool | None = None
    own_file_system: bool | None = None
    dma: bool | None = None


class _Checks(msgspec.Struct, forbid_unknown_fields=True):
    overlap_errno: str | None = None
    signed_range_end: bool | None = None
    prepare_before_overlap: bool | None = None


class _Flags(msgspec.Struct, forbid_unknown_fields=True):
    guest_memfd: dict[str, Any] = {}
    memory_region: dict[str, Any] = {}


class _LevelFile(msgspec.Struct, forbid_unknown_fields=True):
    base: str | None = None
    about: str | None = None
    vm_types: list[str] | None = None
    guest_memfd: _GuestMemfd = msgspec.field(default_factory=_GuestMemfd)
    checks: _Checks = msgspec.field(default_factory=_Checks)
    capabilities: dict[str, Any] = {}
    answers: dict[str, Any] = {}
    ioctls: dict[str, Any] = {}
    flags: _Flags = msgspec.field(default_factory=_Flags)


def read_level(path: Path) -> AbiLevel:
    """The level that a user's file describes; its name is the file's.

    Raises: Refusal ENOENT `level.not_found`; EINVAL `level.syntax`, `level.field`, `level.value`, `level.base`,
    `level.incomplete`, and what `contradictions.check` refuses. The fact `at` is file and line.
    """
    return _build(path.stem, path, str(path))


def _build(name: str, file: Traversable, shown: str) -> AbiLevel:
    settings, places = _read(file, shown)
    missing = [path for path in _REQUIRED if settings.get(path) is None]
    if missing:
        lacking = ", ".join(".".join(path) for path in missing)
        raise Refusal(errno.EINVAL, "level.incomplete", at=shown, lacking=lacking, help='name a base, such as "v7.3"')
    contradictions.check(settings, places)
    return AbiLevel(
        name=name,
        about=settings[("about",)],
        in_place=settings["guest_memfd", "in_place"],
        own_file_system=settings["guest_memfd", "own_file_system"],
        gmem_dma=settings["guest_memfd", "dma"],
        overlap_errno=getattr(errno, settings["checks", "overlap_errno"]),
        signed_range_end=settings["checks", "signed_range_end"],
        prepare_before_overlap=settings["checks", "prepare_before_overlap"],
        vm_types=tuple(VmType[vm_type] for vm_type in settings[("vm_types",)]),
        capabilities=_table(settings, "capabilities"),
        answers=_table(settings, "answers"),
        ioctls=_table(settings, "ioctls"),
        create_flags=_masks(settings, "guest_memfd"),
        region_flags=_masks(settings, "memory_region"),
    )


Settings = dict[tuple[str, ...], Any]
"""By path in the file: ("capabilities", "GUEST_MEMFD") to 234."""

_REQUIRED = (
    ("about",),
    ("vm_types",),
    *(("guest_memfd", name) for name in _GuestMemfd.__struct_fields__),
    *(("checks", name) for name in _Checks.__struct_fields__),
)


def _read(file: Traversable, shown: str) -> tuple[Settings, Places]:
    """What a file and its bases say, and where each of it stands."""
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise Refusal(errno.ENOENT, "level.not_found", at=shown, reason=error.strerror) from None
    except UnicodeDecodeError as error:
        raise Refusal(errno.EINVAL, "level.syntax", at=shown, reason=str(error)) from None
    own = Places(text, shown)
    level_file = _convert(text, own)
    settings, places = _base(level_file, own)
    for path, value in _flatten(msgspec.to_builtins(level_file)):
        settings.pop(path, None)  # the later of two that contradict each other is this file's
        if value is not False or path[0] not in _NUMBERED:
            settings[path] = value
        places.take(path, own)
    return settings, places


def _convert(text: str, places: Places) -> _LevelFile:
    try:
        return msgspec.convert(tomllib.loads(text), _LevelFile)
    except tomllib.TOMLDecodeError as error:
        reason, _, where = str(error).partition(" (at ")
        line = re.search(r"line (\d+)", where)
        at = places.at_line(int(line.group(1)) if line else places.last_line)
        raise Refusal(errno.EINVAL, "level.syntax", at=at, reason=reason) from None
    except msgspec.ValidationError as error:
        found = _AT.match(str(error))
        assert found is not None
        path = tuple(part for part in (found["path"] or "").split(".") if part)
        unknown = re.search(r"unknown field `(\w+)`", found["what"])
        if unknown:
            path = (*path, unknown.group(1))
        raise Refusal(errno.EINVAL, "level.field", at=places.of(path), reason=found["what"]) from None


def _base(level_file: _LevelFile, own: Places) -> tuple[Settings, Places]:
    if level_file.base is None:
        return {}, Places("", own.file)
    if level_file.base not in _NAMES:
        raise Refusal(
            errno.EINVAL, "level.base", at=own.of(("base",)), base=level_file.base, there_are=", ".join(_NAMES)
        )
    settings, places = _read_named(level_file.base)
    return dict(settings), places.copy()


@functools.cache
def _read_named(name: str) -> tuple[Settings, Places]:
    return _read(_FILES / f"{name}.toml", f"{name}.toml")


_NUMBERED = ("capabilities", "answers", "ioctls", "flags")


def _flatten(tables: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """What the file says and not what it leaves out."""
    for name, value in tables.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, (*above, name))
        elif value is not None:
            yield (*above, name), value


def _table(settings: Settings, *table: str) -> dict[str, int]:
    return {path[-1]: value for path, value in settings.items() if path[:-1] == table}


def _masks(settings: Settings, kind: str) -> dict[str, int]:
    return {name: 1 << bit for name, bit in _table(settings, "flags", kind).items()}


class _Levels(Mapping[str, AbiLevel]):
    """Read when one is asked for."""

    def __getitem__(self, name: str) -> AbiLevel:
        if name not in _NAMES:
            raise KeyError(name)
        return _named(name)

    def __iter__(self) -> Iterator[str]:
        return iter(_NAMES)

    def __len__(self) -> int:
        return len(_NAMES)


@functools.cache
def _named(name: str) -> AbiLevel:
    return _build(name, _FILES / f"{name}.toml", f"{name}.toml")


LEVELS: Mapping[str, AbiLevel] = _Levels()
FUTURE = LEVELS["future"]
MAINLINE = LEVELS["v7.4"].capabilities
"""Capability numbers in our code: those of the newest kernel."""
