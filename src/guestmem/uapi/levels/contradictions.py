"""What a level file may not say, though each word of it is legal: each a rule, told with file and line."""

from __future__ import annotations

import errno
from collections.abc import Collection, Mapping
from typing import Any

from guestmem.trace import Refusal
from guestmem.uapi.kvm import VmType
from guestmem.uapi.levels.level import CREATE_FLAGS, LEVEL_IOCTLS, REGION_FLAGS
from guestmem.uapi.levels.places import Places

_OVERLAP_ERRNOS = ("EINVAL", "EEXIST")
_X86_VM_TYPES = tuple(vm_type.name for vm_type in VmType if vm_type < 32)
_PRIVATE_VM_TYPES = tuple(name for name in _X86_VM_TYPES if name != "DEFAULT")
_FIXED_REGION_FLAGS = ("LOG_DIRTY_PAGES", "READONLY", "GUEST_MEMFD")

_LIMITS: Mapping[tuple[str, ...], int] = {
    ("capabilities",): 1 << 31,
    ("answers",): 1 << 31,
    ("ioctls",): 1 << 32,
    ("flags", "guest_memfd"): 58,  # the bits above are the log2 of a page size
    ("flags", "memory_region"): 32,
}

Settings = Mapping[tuple[str, ...], Any]


def check(settings: Settings, places: Places) -> None:
    """Raises: Refusal EINVAL `level.value`, `level.unknown`, `level.same_number`, `level.same_request`,
    `level.same_bit`, `level.in_place_without_mmap`, `level.in_place_without_ioctl`, `level.no_conversion`."""
    _check_values(settings, places)
    _check_names(settings, places)
    for path, other in _doubles(settings, ("capabilities",)):
        raise Refusal(errno.EINVAL, "level.same_number", at=places.of(path), **_pair(settings, path, other, places))
    for path, other in _doubles(settings, ("ioctls",)):
        raise Refusal(errno.EINVAL, "level.same_request", at=places.of(path), **_pair(settings, path, other, places))
    for path, other in _doubles(settings, ("flags", "guest_memfd")):
        raise Refusal(errno.EINVAL, "level.same_bit", at=places.of(path), **_pair(settings, path, other, places))
    for path, bit in settings.items():
        if path[:2] == ("flags", "memory_region") and bit < len(_FIXED_REGION_FLAGS):
            names = f"{path[-1]} and {_FIXED_REGION_FLAGS[bit]}"
            raise Refusal(errno.EINVAL, "level.same_bit", at=places.of(path), names=names, number=str(bit))
    _check_conversion(settings, places)


def _check_values(settings: Settings, places: Places) -> None:
    """Numbers are numbers: capabilities 0 to 2**31 - 1, requests 32 bits, flags the number of a bit."""
    for path, value in settings.items():
        limit = _LIMITS.get(path[:2], _LIMITS.get(path[:1]))
        if limit is None:
            continue
        is_nested = len(path) != (3 if path[0] == "flags" else 2)
        if is_nested or isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < limit:
            raise Refusal(errno.EINVAL, "level.value", at=places.of(path), key=path[-1], value=value, below=limit)


def _check_names(settings: Settings, places: Places) -> None:
    """A name means something only where there is something behind it."""
    _known(("checks", "overlap_errno"), [settings["checks", "overlap_errno"]], _OVERLAP_ERRNOS, places)
    _known(("vm_types",), settings[("vm_types",)], _X86_VM_TYPES, places)
    for path in settings:
        if path[0] == "ioctls":
            _known(path, path[1:], LEVEL_IOCTLS, places)
        elif path[0] == "flags":
            _known(path, path[2:], CREATE_FLAGS if path[1] == "guest_memfd" else REGION_FLAGS, places)
        elif path[0] == "answers" and ("capabilities", path[1]) not in settings:
            raise Refusal(errno.EINVAL, "level.unknown", at=places.of(path), name=path[1], reason="no such capability")


def _known(path: tuple[str, ...], names: Collection[str], known: Collection[str], places: Places) -> None:
    for name in names:
        if name not in known:
            raise Refusal(errno.EINVAL, "level.unknown", at=places.of(path), name=name, there_are=", ".join(known))


def _doubles(settings: Settings, table: tuple[str, ...]) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Entries of a table that have an earlier entry's number, each with that one."""
    first: dict[int, tuple[str, ...]] = {}
    found = []
    for path, value in settings.items():
        if path[:-1] == table:
            if value in first:
                found.append((path, first[value]))
            first.setdefault(value, path)
    return found


def _pair(settings: Settings, path: tuple[str, ...], other: tuple[str, ...], places: Places) -> dict[str, object]:
    return {"names": f"{path[-1]} and {other[-1]}", "number": str(settings[path]), "other_at": places.of(other)}


def _check_conversion(settings: Settings, places: Places) -> None:
    in_place, at = settings["guest_memfd", "in_place"], places.of(("guest_memfd", "in_place"))
    has_call = ("ioctls", "SET_MEMORY_ATTRIBUTES2") in settings
    if in_place and ("flags", "guest_memfd", "MMAP") not in settings:
        raise Refusal(errno.EINVAL, "level.in_place_without_mmap", at=at, removed_at=places.of(_MMAP))
    if in_place != has_call:
        raise Refusal(errno.EINVAL, "level.in_place_without_ioctl", at=at, in_place=in_place, has_ioctl=has_call)
    private = [name for name in settings[("vm_types",)] if name in _PRIVATE_VM_TYPES]
    if private and not has_call and ("ioctls", "SET_MEMORY_ATTRIBUTES") not in settings:
        raise Refusal(errno.EINVAL, "level.no_conversion", at=places.of(("vm_types",)), vm_types=", ".join(private))


_MMAP = ("flags", "guest_memfd", "MMAP")
