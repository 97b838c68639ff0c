"""struct kvm_cpuid2 in a client's memory, as tables of the engine. Source: arch/x86/kvm/cpuid.c."""

from __future__ import annotations

import errno
import struct

from guestmem.cpu.cpuid import INDEXED
from guestmem.cpu.engine import CpuidTable
from guestmem.serve.call import Call
from guestmem.trace import Refusal

_HEADER = struct.Struct("<II")  # nent, padding
_ENTRY = struct.Struct("<IIIIIII12x")  # function, index, flags, eax, ebx, ecx, edx
_SIGNIFICANT_INDEX = 1
_MAX_ENTRIES = 256


async def write_cpuid(call: Call, argument: int, table: CpuidTable) -> None:
    """Fill in a list that has room for `nent` entries. Raises: Refusal E2BIG `list.too_small`."""
    memory = call.client.memory
    room, _ = _HEADER.unpack(await memory.copy_from_user(argument, _HEADER.size))
    if room < len(table):
        raise Refusal(errno.E2BIG, "list.too_small", room=room, needed=len(table))
    entries = b"".join(
        _ENTRY.pack(leaf, index, _SIGNIFICANT_INDEX if leaf in INDEXED else 0, *registers)
        for (leaf, index), registers in table.items()
    )
    await memory.copy_to_user(argument, _HEADER.pack(len(table), 0))
    await memory.copy_to_user(argument + _HEADER.size, entries)


async def read_cpuid(call: Call, argument: int) -> CpuidTable:
    """Take a list from the client. Raises: Refusal E2BIG `list.too_long`."""
    memory = call.client.memory
    count, _ = _HEADER.unpack(await memory.copy_from_user(argument, _HEADER.size))
    if count > _MAX_ENTRIES:
        raise Refusal(errno.E2BIG, "list.too_long", count=count, limit=_MAX_ENTRIES)
    data = await memory.copy_from_user(argument + _HEADER.size, count * _ENTRY.size)
    table: CpuidTable = {}
    for leaf, index, flags, eax, ebx, ecx, edx in _ENTRY.iter_unpack(data):
        table[leaf, index if flags & _SIGNIFICANT_INDEX else 0] = (eax, ebx, ecx, edx)
    return table
