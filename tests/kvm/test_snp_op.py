"""KVM_MEMORY_ENCRYPT_OP: commands in every order, and fields that have no such value. In C: clients/snp.c."""

from __future__ import annotations

import struct

import pytest

from guestmem.host import Host
from guestmem.kvm.ioctl import ioctl
from guestmem.memory import PAGE_SIZE
from guestmem.trace import Refusal
from guestmem.uapi.kvm import KVM_MEMORY_ENCRYPT_OP, VmType
from guestmem.userspace import View

POLICY = 1 << 17
INIT2, START, UPDATE, FINISH = 22, 100, 101, 102
FIELDS = {
    INIT2: struct.pack("<QIHH8I", *(0,) * 12),
    START: struct.pack("<Q56x16x", POLICY),
    UPDATE: struct.pack("<QQQBBHI32x", 0, 0, PAGE_SIZE, 1, 0, 0, 0),
    FINISH: bytes(96),
}
ORDERS = [
    # (commands, answer to the last, source)
    ([START], "snp_op.order", "sev_mem_enc_ioctl"),
    ([INIT2], "", "sev_guest_init2"),
    ([INIT2, INIT2], "snp_op.order", "sev_guest_init2"),
    ([INIT2, 7], "snp_op.command", "sev_mem_enc_ioctl, default"),
    ([INIT2, UPDATE], "launch.update", "snp_launch_update, no context"),
    ([INIT2, FINISH], "launch.finish", "snp_launch_finish, no context"),
    ([INIT2, START], "", "snp_launch_start"),
    ([INIT2, START, START], "launch.start", "snp_launch_start, has a context"),
    ([INIT2, START, UPDATE], "", "snp_launch_update, in place"),
    ([INIT2, START, UPDATE, UPDATE], "launch.update", "sev_gmem_post_populate, assigned already"),
    ([INIT2, START, UPDATE, FINISH], "", "snp_launch_finish"),
    ([INIT2, START, FINISH, UPDATE], "launch.done", "snp_launch_update, launched"),
]


@pytest.mark.parametrize(("commands", "answer", "source"), ORDERS)
def test_commands_in_order(commands: list[int], answer: str, source: str) -> None:
    with Host(memory=1 << 20) as host:
        client = Client(host)
        answers = [client.call(command) for command in commands]
        assert answers[-1] == answer, source
        assert not any(answers[:-1])


BAD = [
    (INIT2, struct.pack("<QIHH8I", 1, *(0,) * 11), "sev_guest_init2, features that are not offered"),
    (START, struct.pack("<Q56x16x", 0), "snp_launch_start, SNP_POLICY_MASK_RSVD_MBO"),
    (UPDATE, struct.pack("<QQQBBHI32x", 0, 0, PAGE_SIZE, 2, 0, 0, 0), "snp_launch_update, VMSA is KVM's own"),
    (UPDATE, struct.pack("<QQQBBHI32x", 0, 0, 100, 1, 0, 0, 0), "snp_launch_update, unaligned"),
    (UPDATE, struct.pack("<QQQBBHI32x", 0, 0, 0, 1, 0, 0, 0), "snp_launch_update, empty"),
    (UPDATE, struct.pack("<QQQBBHI32x", 0, 0, PAGE_SIZE, 1, 0, 1, 0), "snp_launch_update, flags"),
    (FINISH, struct.pack("<QQB79x", 0, 0, 1), "an ID block"),
]


@pytest.mark.parametrize(("command", "fields", "source"), BAD)
def test_a_field_that_has_no_such_value(command: int, fields: bytes, source: str) -> None:
    with Host(memory=1 << 20) as host:
        client = Client(host)
        for before in (INIT2, START)[: (INIT2, START, UPDATE).index(min(command, UPDATE))]:
            assert not client.call(before)
        assert client.call(command, fields) == "snp_op.argument", source


class Client:
    """An SNP VM with a private page at 0, and memory for arguments."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.vm = host.create_vm(VmType.SNP)
        self.vm.set_memory_region(0, 0, PAGE_SIZE, gmem=self.vm.create_guest_memfd(PAGE_SIZE))
        self.memory: View = host.anonymous(PAGE_SIZE)

    def call(self, command: int, fields: bytes | None = None) -> str:
        """The rule of the refusal, if any."""
        data = FIELDS.get(command, b"") if fields is None else fields
        self.memory[0:24] = struct.pack("<IIQII", command, 0, self.memory.hva + 64, 0, 0)
        self.memory[64 : 64 + len(data)] = data
        try:
            self.host.run(ioctl(self.host.process, self.vm.fd, KVM_MEMORY_ENCRYPT_OP, self.memory.hva), "ioctl")
        except Refusal as refusal:
            return refusal.rule
        return ""
