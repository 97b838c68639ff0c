"""The ID block: what a guest's owner says that the guest is, signed. Firmware compares at the end of the launch.

    ID block, 96 bytes:   launch digest 48 | family id 16 | image id 16 | version 4 | guest SVN 4 | policy 8
    ID auth, 4096 bytes:  0x000 algorithms of the ID key and of the author's key, 4 each | 0x040 signature of the block
                          0x240 the ID key | 0x680 signature of the ID key by the author's | 0x880 the author's key
    a key, 0x404 bytes:   curve 4 | x 72 | y 72 | zeros         a signature, 0x200 bytes: r 72 | s 72 | zeros

Numbers are little-endian. The one algorithm is ECDSA on P-384 with SHA-384.

Source: SEV Secure Nested Paging Firmware ABI Specification, 8.18 SNP_LAUNCH_FINISH and chapter 10 (keys, signatures);
AMDESE/sev-guest include/id-block.h, sev-ecdsa.h. From memory: that the signature is looked at before the digest, and
the digest before the policy.
"""

from __future__ import annotations

import hashlib
import struct
from typing import NamedTuple

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384

from guestmem.arch.snp.status import SevStatus

ID_BLOCK_BYTES, ID_AUTH_BYTES, HOST_DATA_BYTES = 96, 4096, 32
VERSION = 1
ECDSA_P384_SHA384 = 1
_CURVE_P384 = 2
_BLOCK = struct.Struct("<48s16s16sIIQ")
_AUTH = struct.Struct("<II56s512s1028s60s512s1028s892s")
_KEY = struct.Struct("<I72s72s880s")
_SIGNATURE = struct.Struct("<72s72s368s")


class IdBlock(NamedTuple):
    """What the owner says; `digest` is the launch digest that the guest must have."""

    digest: bytes
    family_id: bytes
    image_id: bytes
    version: int
    guest_svn: int
    policy: int


class LaunchFinish(NamedTuple):
    """What SNP_LAUNCH_FINISH is given: an ID block with its authentication, or none; and what a host may add."""

    id_block: bytes | None = None
    id_auth: bytes = bytes(ID_AUTH_BYTES)
    author_key: bool = False
    vcek_disabled: bool = False
    host_data: bytes = bytes(HOST_DATA_BYTES)


NO_ID_BLOCK = LaunchFinish()


class Attested(NamedTuple):
    """What an attestation report says of a guest besides its digest; key digests are zeros without a key."""

    id_block: IdBlock | None
    id_key_digest: bytes
    author_key_digest: bytes
    vcek_disabled: bool
    host_data: bytes


def check(finish: LaunchFinish, digest: bytes, policy: int) -> Attested | SevStatus:
    """What will be attested, or why the guest is not what its owner says."""
    if finish.id_block is None:
        return Attested(None, bytes(48), bytes(48), finish.vcek_disabled, finish.host_data)
    id_algorithm, author_algorithm, _, block_signature, id_key, _, key_signature, author_key, _ = _AUTH.unpack(
        finish.id_auth
    )
    block = IdBlock(*_BLOCK.unpack(finish.id_block))
    wanted = (id_algorithm, author_algorithm) if finish.author_key else (id_algorithm,)
    if block.version != VERSION or any(algorithm != ECDSA_P384_SHA384 for algorithm in wanted):
        return SevStatus.INVALID_PARAM
    if not _verified(id_key, block_signature, finish.id_block):
        return SevStatus.BAD_SIGNATURE
    if finish.author_key and not _verified(author_key, key_signature, id_key):
        return SevStatus.BAD_SIGNATURE
    if block.digest != digest:
        return SevStatus.BAD_MEASUREMENT
    if block.policy != policy:
        return SevStatus.POLICY_FAILURE
    author_digest = hashlib.sha384(author_key).digest() if finish.author_key else bytes(48)
    id_digest = hashlib.sha384(id_key).digest()
    return Attested(block, id_digest, author_digest, finish.vcek_disabled, finish.host_data)


def _verified(key: bytes, signature: bytes, message: bytes) -> bool:
    """Whether `signature` over `message` is by `key`, which must be a point of P-384."""
    curve, x, y, _ = _KEY.unpack(key)
    r, s, _ = _SIGNATURE.unpack(signature)
    if curve != _CURVE_P384:
        return False
    try:
        numbers = ec.EllipticCurvePublicNumbers(_number(x), _number(y), ec.SECP384R1())
        public = numbers.public_key()
        public.verify(encode_dss_signature(_number(r), _number(s)), message, ec.ECDSA(SHA384()))
    except (ValueError, InvalidSignature):
        return False
    return True


def _number(field: bytes) -> int:
    return int.from_bytes(field, "little")
