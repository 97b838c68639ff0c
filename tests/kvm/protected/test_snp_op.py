"""KVM_MEMORY_ENCRYPT_OP: commands in every order, and fields that have no such value. In C: clients/snp.c."""

from __future__ import annotations

import errno
import struct

import pytest

from guestmem.arch.snp import SnpGuest
from guestmem.host import Host
from guestmem.kvm.enc_context import copy_enc_context_from
from guestmem.kvm.ioctl import ioctl
from guestmem.memory import PAGE_SIZE
from guestmem.trace import Refusal
from guestmem.uapi.kvm import KVM_MEMORY_ENCRYPT_OP, VmType
from guestmem.userspace import View
from tests.arch.id_blocks import id_auth, id_block

POLICY = 1 << 17
INIT2, START, UPDATE, FINISH, CERTS = 22, 100, 101, 102, 103
GUEST_STATUS = 16
VCPU = -1  # KVM_CREATE_VCPU
BLOCK_AT, AUTH_AT = 0x400, 0x1000


def init2(features: int = 0, flags: int = 0, ghcb: int = 0, pad: int = 0) -> bytes:
    return struct.pack("<QIHH8I", features, flags, ghcb, pad, *(pad,) * 8)


def start(policy: int = POLICY, flags: int = 0) -> bytes:
    return struct.pack("<Q16xH6x32x", policy, flags)


def update(length: int = PAGE_SIZE, kind: int = 1, flags: int = 0, pad: int = 0, uaddr: int = 0) -> bytes:
    return struct.pack("<QQQBBHI32x", 0, uaddr, length, kind, pad, flags, 0)


def finish(
    block: int = 0, auth: int = 0, block_en: int = 0, author_en: int = 0, flags: int = 0, host_data: bytes = b""
) -> bytes:
    packed = struct.pack("<QQBBB32s3xH32x", block, auth, block_en, author_en, 1, host_data, flags)
    assert len(packed) == 88
    return packed


FIELDS = {INIT2: init2(), START: start(), UPDATE: update(), FINISH: finish()}
ORDERS = [
    # (commands, answer to the last, source)
    ([START], "ENOTTY snp_op.not_init", "snp_launch_start"),
    ([UPDATE], "EINVAL snp_op.not_init", "snp_launch_update"),
    ([FINISH], "ENOTTY snp_op.not_init", "snp_launch_finish"),
    ([CERTS], "EINVAL snp_op.not_init", "snp_enable_certs"),
    ([0], "EINVAL snp_op.not_init", "sev_guest_init, not for this type of VM"),
    ([2], "ENOTTY snp_op.not_init", "sev_launch_start, no SEV guest"),
    ([GUEST_STATUS], "ENOTTY snp_op.not_init", "sev_guest_status, no SEV guest"),
    ([19], "EINVAL snp_op.command", "sev_mem_enc_ioctl, a number without a command"),
    ([INIT2], "", "sev_guest_init2"),
    ([INIT2, INIT2], "EPERM snp_op.not_snp", "sev_mem_enc_ioctl"),
    ([INIT2, GUEST_STATUS], "EPERM snp_op.not_snp", "sev_mem_enc_ioctl"),
    ([INIT2, 99], "EPERM snp_op.not_snp", "sev_mem_enc_ioctl"),
    ([INIT2, 104], "EINVAL snp_op.command", "sev_mem_enc_ioctl, default"),
    ([VCPU, INIT2], "EINVAL snp_op.vcpus", "__sev_guest_init"),
    ([INIT2, CERTS], "", "snp_enable_certs"),
    ([INIT2, VCPU, CERTS], "EINVAL snp_op.vcpus", "snp_enable_certs"),
    ([INIT2, UPDATE], "EINVAL snp_op.no_context", "snp_launch_update, no context"),
    ([INIT2, FINISH], "EINVAL snp_op.no_context", "snp_launch_finish, no context"),
    ([INIT2, START], "", "snp_launch_start"),
    ([INIT2, START, START], "EINVAL snp_op.context", "snp_launch_start, has a context"),
    ([INIT2, START, UPDATE], "", "snp_launch_update, in place"),
    ([INIT2, START, UPDATE, UPDATE], "EIO snp_op.populate", "sev_gmem_post_populate, assigned already"),
    ([INIT2, START, UPDATE, FINISH], "", "snp_launch_finish"),
    ([INIT2, START, FINISH, UPDATE], "EINVAL launch.done", "snp_launch_update, launched"),
    ([INIT2, START, FINISH, FINISH], "EINVAL launch.done", "snp_launch_finish, launched"),
]


@pytest.mark.parametrize(("commands", "answer", "source"), ORDERS)
def test_commands_in_order(commands: list[int], answer: str, source: str) -> None:
    with Host(memory=1 << 20) as host:
        client = Client(host)
        answers = [client.call(command) for command in commands]
        assert answers[-1] == answer, source
        assert not any(answers[:-1])


FIELD_VALUES = [
    (INIT2, init2(features=0x20), "", "DEBUG_SWAP is offered"),
    (INIT2, init2(features=0x1), "EINVAL snp_op.argument", "__sev_guest_init, SNP_ACTIVE is KVM's own"),
    (INIT2, init2(features=0x200), "EINVAL snp_op.argument", "__sev_guest_init, SECURE_TSC is not offered"),
    (INIT2, init2(flags=1), "EINVAL snp_op.argument", "__sev_guest_init"),
    (INIT2, init2(ghcb=2), "", "__sev_guest_init"),
    (INIT2, init2(ghcb=1), "EINVAL snp_op.argument", "__sev_guest_init, SNP wants version 2"),
    (INIT2, init2(ghcb=3), "EINVAL snp_op.argument", "__sev_guest_init, GHCB_VERSION_MAX"),
    (INIT2, init2(pad=7), "", "__sev_guest_init does not look at padding"),
    (START, start(0), "EINVAL snp_op.policy", "snp_launch_start, SNP_POLICY_MASK_RSVD_MBO"),
    (START, start(POLICY | 1 << 18), "EINVAL snp_op.policy", "KVM_SNP_POLICY_MASK_VALID, no migration agent"),
    (START, start(POLICY | 1 << 26), "EINVAL snp_op.policy", "KVM_SNP_POLICY_MASK_VALID"),
    (START, start(flags=1), "EINVAL snp_op.argument", "snp_launch_start"),
    (START, start(POLICY | 0x0238), "EIO launch.start", "firmware: POLICY_FAILURE, no such version"),
    (UPDATE, update(kind=2), "EINVAL snp_op.argument", "snp_launch_update, VMSA is KVM's own"),
    (UPDATE, update(length=100), "EINVAL snp_op.argument", "snp_launch_update, unaligned"),
    (UPDATE, update(length=0), "EINVAL snp_op.argument", "snp_launch_update, empty"),
    (UPDATE, update(flags=1), "EINVAL snp_op.argument", "snp_launch_update, flags"),
    (UPDATE, update(pad=1), "", "snp_launch_update does not look at padding"),
    (UPDATE, update(uaddr=0x1000), "EIO snp_op.populate", "snp_launch_update, whatever fails in populate"),
    (FINISH, finish(flags=1), "EINVAL snp_op.argument", "snp_launch_finish"),
    (FINISH, finish(block_en=1), "EINVAL snp_op.argument", "psp_copy_user_blob, no address"),
    (FINISH, finish(0x1000, 0x1000, 1), "EFAULT user.copy", "psp_copy_user_blob"),
]


@pytest.mark.parametrize(("command", "fields", "answer", "source"), FIELD_VALUES)
def test_fields(command: int, fields: bytes, answer: str, source: str) -> None:
    with Host(memory=1 << 20) as host:
        client = Client(host)
        for before in (INIT2, START)[: (INIT2, START, UPDATE).index(min(command, UPDATE))]:
            assert not client.call(before)
        assert client.call(command, fields) == answer, source


def test_without_an_argument_nothing_is_done() -> None:
    """sev_mem_enc_ioctl: how a VMM asks whether there is SEV."""
    with Host(memory=1 << 20) as host:
        client = Client(host)
        assert host.run(ioctl(host.process, client.vm.fd, KVM_MEMORY_ENCRYPT_OP, 0), "ioctl") == 0


def test_a_helper_has_no_commands() -> None:
    """is_cmd_allowed_from_mirror."""
    with Host(memory=1 << 20) as host:
        owner, helper = Client(host), Client(host, memory=False)
        assert not owner.call(INIT2)
        host.run(copy_enc_context_from(helper.vm.kvm, host.process.fds, owner.vm.fd), "copy")
        assert helper.call(START) == "EINVAL snp_op.mirror"
        assert helper.call(GUEST_STATUS) == "EPERM snp_op.not_snp"


class TestIdBlock:
    """Source: snp_launch_finish; SNP Firmware ABI 8.18."""

    def launch(self, host: Host, block: bytes, auth: bytes, author: int = 0) -> tuple[str, Client]:
        """The answer to SNP_LAUNCH_FINISH."""
        client = self.begun(host)
        memory = client.memory
        memory[BLOCK_AT : BLOCK_AT + 96] = block
        memory[AUTH_AT : AUTH_AT + 4096] = auth
        end = finish(memory.hva + BLOCK_AT, memory.hva + AUTH_AT, 1, author, host_data=b"host data")
        return client.call(FINISH, end), client

    def begun(self, host: Host) -> Client:
        client = Client(host)
        assert not any(client.call(command) for command in (INIT2, START, UPDATE))
        return client

    def digest(self) -> bytes:
        """The launch digest of the same guest: what its owner computes."""
        with Host(memory=1 << 20) as host:
            client = self.begun(host)
            assert not client.call(FINISH)
            assert client.guest.context is not None
            return client.guest.context.digest

    @pytest.mark.parametrize("author", [0, 1])
    def test_a_guest_that_is_what_its_owner_says(self, author: int) -> None:
        block = id_block(self.digest(), POLICY)
        with Host(memory=1 << 20) as host:
            answer, client = self.launch(host, block, id_auth(block, bool(author)), author)
            assert answer == ""
            assert client.guest.launched
            assert client.guest.context is not None
            attested = client.guest.context.attested
            assert attested is not None
            assert attested.id_block is not None
            assert attested.id_block.guest_svn == 3
            assert attested.vcek_disabled
            assert attested.host_data.rstrip(b"\0") == b"host data"
            assert any(attested.author_key_digest) is bool(author)

    def test_a_guest_that_is_not(self) -> None:
        digest = self.digest()
        for block, auth_of, error in (
            (id_block(bytes(48), POLICY), None, 0xB),
            (id_block(digest, POLICY | 1 << 19), None, 7),
            (id_block(digest, POLICY), id_block(bytes(48), POLICY), 0xA),
            (id_block(digest, POLICY, version=2), None, 0x16),
        ):
            with Host(memory=1 << 20) as host:
                answer, client = self.launch(host, block, id_auth(auth_of or block))
                assert (answer, client.error) == ("EIO launch.finish", error)
                assert not client.guest.launched
                assert not client.call(FINISH), "nothing changed: without an ID block it is launched"


class Client:
    """An SNP VM with a private page at 0, and memory for arguments."""

    def __init__(self, host: Host, *, memory: bool = True) -> None:
        self.host = host
        self.vm = host.create_vm(VmType.SNP)
        if memory:
            self.vm.set_memory_region(0, 0, PAGE_SIZE, gmem=self.vm.create_guest_memfd(PAGE_SIZE))
        self.memory: View = host.anonymous(2 * PAGE_SIZE)
        self.error = 0

    @property
    def guest(self) -> SnpGuest:
        guest = self.vm.kvm.machine.architecture
        assert isinstance(guest, SnpGuest)
        return guest

    def call(self, command: int, fields: bytes | None = None) -> str:
        """The errno and rule of the refusal, if any."""
        if command == VCPU:
            self.vm.create_vcpu()
            return ""
        data = FIELDS.get(command, b"") if fields is None else fields
        self.memory[0:24] = struct.pack("<IIQII", command, 0, self.memory.hva + 64, 0, 0)
        self.memory[64 : 64 + len(data)] = data
        try:
            self.host.run(ioctl(self.host.process, self.vm.fd, KVM_MEMORY_ENCRYPT_OP, self.memory.hva), "ioctl")
        except Refusal as refusal:
            return f"{errno.errorcode[refusal.errno or 0]} {refusal.rule}"
        finally:
            (self.error,) = struct.unpack("<I", bytes(self.memory[16:20]))
        return ""
