"""A balloon: which call gives the host its memory back?

A VMM that inflates a balloon wants the pages of the guest. On a mapping of a guest_memfd MADV_DONTNEED "succeeds" and
frees nothing, since the mapping is shared; a hole frees (known bug B65, firecracker issue 6167).
"""

from __future__ import annotations

from guestmem import Host, VmType

SIZE = 1 << 20


def main() -> None:
    with Host() as host:
        gmem = host.create_vm(VmType.DEFAULT).create_guest_memfd(SIZE, mmap=True, init_shared=True)
        view = gmem.mmap()
        view.write(0, bytes(SIZE))
        print(f"touched:         {gmem.statistics().allocated:3} pages held")
        host.run(host.process.mm.discard(view.hva, SIZE))
        print(f"MADV_DONTNEED:   {gmem.statistics().allocated:3} pages held")
        host.run(host.process.mm.remove(view.hva, SIZE // 2))
        print(f"MADV_REMOVE 1/2: {gmem.statistics().allocated:3} pages held")
        gmem.punch_hole(0, SIZE)
        print(f"PUNCH_HOLE:      {gmem.statistics().allocated:3} pages held")


if __name__ == "__main__":
    main()
