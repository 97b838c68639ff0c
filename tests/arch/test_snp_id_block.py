"""What firmware compares at the end of a launch, against SNP Firmware ABI 8.18 and the layouts of AMDESE/sev-guest."""

from __future__ import annotations

import hashlib

import pytest

from guestmem.arch.snp import policy
from guestmem.arch.snp.id_block import Attested, LaunchFinish, check
from guestmem.arch.snp.status import SevStatus
from tests.arch.id_blocks import AUTHOR, KEY, id_auth, id_block, public

DIGEST = hashlib.sha384(b"guest").digest()
POLICY = policy.RESERVED_1 | policy.SMT
BLOCK = id_block(DIGEST, POLICY)
AUTH = id_auth(BLOCK)


def changed(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


REFUSED = [
    # (the launch's end, status, source)
    (LaunchFinish(BLOCK, changed(AUTH, 0x40)), SevStatus.BAD_SIGNATURE, "8.18: signature, R"),
    (LaunchFinish(BLOCK, changed(AUTH, 0x40 + 72)), SevStatus.BAD_SIGNATURE, "8.18: signature, S"),
    (LaunchFinish(changed(BLOCK, 48), AUTH), SevStatus.BAD_SIGNATURE, "8.18: another family than was signed"),
    (LaunchFinish(BLOCK, changed(AUTH, 0x240)), SevStatus.BAD_SIGNATURE, "10.2: no such curve"),
    (LaunchFinish(BLOCK, changed(AUTH, 0x244)), SevStatus.BAD_SIGNATURE, "10.2: no point of the curve"),
    (LaunchFinish(BLOCK, id_auth(BLOCK, key_algorithm=2)), SevStatus.INVALID_PARAM, "8.18: ID_KEY_ALGO"),
    (LaunchFinish(BLOCK, AUTH, author_key=True), SevStatus.INVALID_PARAM, "8.18: AUTHOR_KEY_ALGO"),
    (
        LaunchFinish(BLOCK, id_auth(BLOCK, author_algorithm=1), author_key=True),
        SevStatus.BAD_SIGNATURE,
        "8.18: no key of an author",
    ),
    (
        LaunchFinish(BLOCK, changed(id_auth(BLOCK, author=True), 0x680), author_key=True),
        SevStatus.BAD_SIGNATURE,
        "8.18: the author's signature of the ID key",
    ),
    (
        LaunchFinish(id_block(DIGEST, POLICY, version=2), id_auth(id_block(DIGEST, POLICY, version=2))),
        SevStatus.INVALID_PARAM,
        "8.18: VERSION is 1",
    ),
    (
        LaunchFinish(id_block(bytes(48), POLICY), id_auth(id_block(bytes(48), POLICY))),
        SevStatus.BAD_MEASUREMENT,
        "8.18: LD is not the guest's",
    ),
    (
        LaunchFinish(id_block(DIGEST, POLICY | policy.DEBUG), id_auth(id_block(DIGEST, POLICY | policy.DEBUG))),
        SevStatus.POLICY_FAILURE,
        "8.18: POLICY is not the guest's",
    ),
]


@pytest.mark.parametrize(("finish", "status", "source"), REFUSED)
def test_refused(finish: LaunchFinish, status: SevStatus, source: str) -> None:
    assert check(finish, DIGEST, POLICY) is status, source


@pytest.mark.parametrize("author", [False, True])
def test_what_is_attested(author: bool) -> None:
    """7.3 ATTESTATION_REPORT: the digests are of the keys as they stand in the authentication, 0x404 bytes."""
    finish = LaunchFinish(BLOCK, id_auth(BLOCK, author), author, vcek_disabled=True, host_data=b"h" * 32)
    attested = check(finish, DIGEST, POLICY)
    assert isinstance(attested, Attested)
    assert attested.id_block is not None
    assert (attested.id_block.digest, attested.id_block.guest_svn, attested.id_block.policy) == (DIGEST, 3, POLICY)
    assert attested.id_block.family_id.rstrip(b"\0") == b"family"
    assert attested.id_key_digest == hashlib.sha384(public(KEY)).digest()
    assert attested.author_key_digest == (hashlib.sha384(public(AUTHOR)).digest() if author else bytes(48))
    assert attested.vcek_disabled
    assert attested.host_data == b"h" * 32


def test_nothing_is_compared_without_an_id_block() -> None:
    assert check(LaunchFinish(host_data=b"h" * 32), DIGEST, POLICY) == (None, bytes(48), bytes(48), False, b"h" * 32)


POLICIES = [
    # (policy, firmware's version, threads of a core, met, source)
    (policy.RESERVED_1, (1, 55), False, True, "4.3: ABI 0.0 is met by any"),
    (0, (1, 55), False, False, "4.3: bit 17 is one"),
    (policy.RESERVED_1, (1, 55), True, False, "4.3: SMT, where it is on"),
    (policy.RESERVED_1 | policy.SMT, (1, 55), True, True, "4.3: SMT"),
    (policy.RESERVED_1 | 0x0137, (1, 55), False, True, "4.3: ABI_MAJOR, ABI_MINOR: 1.55"),
    (policy.RESERVED_1 | 0x0138, (1, 55), False, False, "4.3: 1.56 is wanted"),
    (policy.RESERVED_1 | 0x0200, (1, 55), False, False, "4.3: 2.0 is wanted"),
    (policy.RESERVED_1 | 0x00FF, (1, 55), False, True, "4.3: 0.255 is older"),
    (policy.RESERVED_1 | policy.DEBUG | policy.SINGLE_SOCKET, (1, 55), False, True, "4.3: DEBUG, SINGLE_SOCKET"),
    (policy.RESERVED_1 | 1 << 26, (1, 55), False, False, "4.3: reserved"),
]


@pytest.mark.parametrize(("bits", "version", "smt", "met", "source"), POLICIES)
def test_policies(bits: int, version: tuple[int, int], smt: bool, met: bool, source: str) -> None:
    assert policy.is_met(bits, version, smt) is met, source
