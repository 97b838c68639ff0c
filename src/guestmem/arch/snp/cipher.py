"""Memory encryption: AES-XTS under the key of an ASID, tweaked by the physical address of the page.

So the same bytes at two addresses differ, and a page that is copied elsewhere is garbage there.

Source: APM volume 2, 7.10 and 15.34, which leave the mode to the implementation: XTS over a page is this model's.
"""

from __future__ import annotations

import hashlib

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from guestmem.memory import PAGE_SHIFT, Pfn

_KEY_BYTES = 32  # two keys of AES-128


class MemoryKey:
    """The key that the memory controller has for an ASID. A new one for each guest, never seen by software."""

    def __init__(self, generation: int) -> None:
        self._key = hashlib.sha384(b"memory key %d" % generation).digest()[:_KEY_BYTES]

    def __fingerprint__(self) -> None:
        """As many keys as generations: the generation is state, what comes of it is not."""

    def encrypt(self, pfn: Pfn, plaintext: bytes) -> bytes:
        """What is in memory where the guest has `plaintext`; a page."""
        return self._cipher(pfn).encryptor().update(plaintext)

    def decrypt(self, pfn: Pfn, stored: bytes) -> bytes:
        """What the guest reads where `stored` is in memory; a page."""
        return self._cipher(pfn).decryptor().update(stored)

    def _cipher(self, pfn: Pfn) -> Cipher[modes.XTS]:
        return Cipher(algorithms.AES(self._key), modes.XTS((pfn << PAGE_SHIFT).to_bytes(16, "little")))
