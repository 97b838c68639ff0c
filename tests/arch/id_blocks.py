"""What a guest's owner does before a launch: an ID block and its authentication, byte by byte, signed."""

from __future__ import annotations

import struct

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384

KEY = ec.derive_private_key(0x1D, ec.SECP384R1())
AUTHOR = ec.derive_private_key(0xA0, ec.SECP384R1())


def id_block(digest: bytes, policy: int, version: int = 1, guest_svn: int = 3) -> bytes:
    return (
        digest
        + b"family".ljust(16, b"\0")
        + b"image".ljust(16, b"\0")
        + struct.pack("<IIQ", version, guest_svn, policy)
    )


def id_auth(block: bytes, author: bool = False, key_algorithm: int = 1, author_algorithm: int | None = None) -> bytes:
    page = bytearray(4096)
    if author_algorithm is None:
        author_algorithm = int(author)
    struct.pack_into("<II", page, 0, key_algorithm, author_algorithm)
    page[0x40:0x240] = signature(KEY, block)
    page[0x240:0x644] = public(KEY)
    if author:
        page[0x680:0x880] = signature(AUTHOR, public(KEY))
        page[0x880:0xC84] = public(AUTHOR)
    assert len(page) == 4096
    return bytes(page)


def public(key: ec.EllipticCurvePrivateKey, curve: int = 2) -> bytes:
    numbers = key.public_key().public_numbers()
    return (struct.pack("<I", curve) + numbers.x.to_bytes(72, "little") + numbers.y.to_bytes(72, "little")).ljust(
        0x404, b"\0"
    )


def signature(key: ec.EllipticCurvePrivateKey, message: bytes) -> bytes:
    r, s = decode_dss_signature(key.sign(message, ec.ECDSA(SHA384())))
    return (r.to_bytes(72, "little") + s.to_bytes(72, "little")).ljust(0x200, b"\0")
