"""boot: what a Linux guest shares from its start to its drivers' first I/O, and takes back.

In this order, with the sources in Linux and our assumptions (*):

- firmware, kernel and initrd are touched: 16 MiB at the top of low memory, 64 MiB at 16 MiB, 128 MiB below the bounce
  buffer*; of the rest the struct pages of all memory, 1/64 of it, at its top;
- .bss..decrypted, 2 MiB in the kernel image, is shared; all but its first 16 pages* is taken back later
  (mem_encrypt_free_decrypted_mem);
- one vCPU for each 4 GiB*, 1 to 1024: its GHCB, a page of the direct map (sev_es_init_vc_handling), and the page of its
  decrypted per-CPU variables (steal time, kvm-clock; __set_percpu_decrypted), 512 KiB apart;
- the bounce buffer, as swiotlb has it;
- three atomic pools of coherent memory, 128 KiB for each GiB, at most 4 MiB (kernel/dma/pool.c);
- the crash kernel's reservation is touched: 64 of its 256 MiB*;
- `count` coherent buffers of drivers, virtqueues above all: 1 to 8 pages each, every second next to the one before*,
  the others anywhere in the memory in use*; no more than there is room for.

The guest ends as kexec does: everything is taken back (enc_kexec_finish).
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from guestmem.simulate.generators import swiotlb
from guestmem.simulate.generators.guest import (
    LOW_MEMORY,
    create,
    share,
    share_in_pieces,
    touch,
    unshare,
    unshare_in_pieces,
)
from guestmem.simulate.source import Replayable

_MIB = 256
_GIB = 1024 * _MIB
_KERNEL = 16 * _MIB
_KERNEL_SIZE = 64 * _MIB
_FIRMWARE_SIZE = 16 * _MIB
_INITRD_SIZE = 128 * _MIB
_CRASH_SIZE = 64 * _MIB
_DECRYPTED_BSS = _KERNEL + 32 * _MIB
_KEPT_OF_BSS = 16
_PER_CPU_STRIDE = 128
_ROOM = 16


def vcpus(pages: int) -> int:
    return min(max(pages // (4 * _GIB), 1), 1024)


def events(pages: int, seed: int, count: int) -> Iterator[Replayable]:
    rng = random.Random(seed)
    low = min(pages, LOW_MEMORY)
    buffer = _below_firmware(swiotlb.region(pages))
    memmap = (pages - pages // 64) // 512 * 512
    yield create(pages)
    yield from touch(low - _FIRMWARE_SIZE, low)
    yield from touch(_KERNEL, _KERNEL + _KERNEL_SIZE)
    yield from touch(buffer[0] - _INITRD_SIZE, buffer[0])
    yield from touch(max(memmap, low), pages)

    yield from share(_DECRYPTED_BSS, _DECRYPTED_BSS + 512)
    single = [page for cpu in range(vcpus(pages)) for page in _pages_of_vcpu(cpu, _KERNEL + _KERNEL_SIZE)]
    for page in single:
        yield from share(page, page + 1)
    yield from share_in_pieces(*buffer)
    pool = min(max(pages // _GIB * 32, 32), 4 * _MIB)
    pools = [(_KERNEL - (number + 1) * 4 * _MIB, _KERNEL - (number + 1) * 4 * _MIB + pool) for number in range(3)]
    for each in pools:
        yield from share(*each)
    yield from unshare(_DECRYPTED_BSS + _KEPT_OF_BSS, _DECRYPTED_BSS + 512)
    crash = buffer[0] - _INITRD_SIZE - _CRASH_SIZE
    yield from touch(crash, crash + _CRASH_SIZE)

    used = (low, memmap) if pages >= LOW_MEMORY + _GIB else (crash - 256 * _MIB, crash)
    buffers = list(_coherent_buffers(rng, used, count))
    for each in buffers:
        yield from share(*each)

    for each in (*buffers, *pools):
        yield from unshare(*each)
    yield from unshare_in_pieces(*buffer)
    for page in single:
        yield from unshare(page, page + 1)
    yield from unshare(_DECRYPTED_BSS, _DECRYPTED_BSS + _KEPT_OF_BSS)


def _below_firmware(region: tuple[int, int]) -> tuple[int, int]:
    return region[0] - _FIRMWARE_SIZE, region[1] - _FIRMWARE_SIZE


def _pages_of_vcpu(number: int, first: int) -> tuple[int, int]:
    per_cpu = first + number * _PER_CPU_STRIDE
    return per_cpu, per_cpu + 1


def _coherent_buffers(rng: random.Random, used: tuple[int, int], count: int) -> Iterator[tuple[int, int]]:
    taken: set[int] = set()
    end = used[0]
    for number in range(min(count, (used[1] - used[0]) // _ROOM)):
        size = rng.randint(1, 8)
        start = end if number % 2 else rng.randrange(used[0], used[1] - 8)
        while start + size > used[1] or not taken.isdisjoint(range(start, start + size)):
            start = rng.randrange(used[0], used[1] - 8)
        end = start + size
        taken.update(range(start, end))
        yield start, end
