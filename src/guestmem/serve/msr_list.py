"""struct kvm_msrs: the list that KVM_GET_MSRS and KVM_SET_MSRS take. Source: arch/x86/kvm/x86.c msr_io."""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable

from guestmem.serve.call import Call
from guestmem.trace import Refusal

_HEADER = struct.Struct("<II")  # nmsrs, padding
_ENTRY = struct.Struct("<IIQ")  # index, reserved, data
_MAX_ENTRIES = 256


async def read_msrs(call: Call, argument: int) -> list[tuple[int, int]]:
    """(index, value) of each. Raises: Refusal E2BIG `list.too_long`."""
    memory = call.client.memory
    count, _ = _HEADER.unpack(await memory.copy_from_user(argument, _HEADER.size))
    if count >= _MAX_ENTRIES:
        raise Refusal(errno.E2BIG, "list.too_long", count=count, limit=_MAX_ENTRIES)
    data = await memory.copy_from_user(argument + _HEADER.size, count * _ENTRY.size)
    return [(index, value) for index, _, value in _ENTRY.iter_unpack(data)]


async def write_msrs(call: Call, argument: int, msrs: Iterable[tuple[int, int]]) -> int:
    """Fill in the first of them; how many."""
    data = b"".join(_ENTRY.pack(index, 0, value) for index, value in msrs)
    await call.client.memory.copy_to_user(argument + _HEADER.size, data)
    return len(data) // _ENTRY.size
