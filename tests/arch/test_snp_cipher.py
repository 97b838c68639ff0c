"""Memory encryption: the same bytes are others under another key, and at another place."""

from __future__ import annotations

from guestmem.arch.snp import SnpPlatform
from guestmem.arch.snp.cipher import MemoryKey
from guestmem.memory import PAGE_SIZE, Pfn
from tests.arch.memory import Pages

GFN = 0x200
SECRET = b"secret"


def test_another_asid_reads_garbage() -> None:
    """Source: APM volume 2, 15.34: each guest has a key of its own, which its ASID stands for."""
    platform, pages = SnpPlatform(1 << 14), Pages(1)
    guest, _ = platform.new_guest(1, 101), platform.new_guest(2, 102)
    page = pages.block()
    guest.make_private(GFN, page)
    pages.write(0, SECRET)
    assert platform.read_as(1, page.pfn, page.hva).startswith(SECRET)
    seen = {platform.read_as(2, page.pfn, page.hva), platform.host_read(page.pfn, page.hva)}
    assert len(seen) == 2
    assert not any(SECRET in page for page in seen)


def test_ciphertext_that_is_moved_is_garbage() -> None:
    key, page = MemoryKey(1), SECRET.ljust(PAGE_SIZE, b"\0")
    stored = key.encrypt(Pfn(1), page)
    assert key.decrypt(Pfn(1), stored) == page
    assert SECRET not in key.decrypt(Pfn(2), stored)
    assert stored != key.encrypt(Pfn(2), page)
