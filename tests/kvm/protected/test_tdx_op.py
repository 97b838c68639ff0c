"""KVM_MEMORY_ENCRYPT_OP on a TDX VM and its vCPUs: commands in every order, and fields that have no such value. In C:
clients/tdx.c."""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable

import pytest

from guestmem.arch.tdx import TdxGuest
from guestmem.arch.tdx.parameters import SEPT_VE_DISABLE, cpuid_configurable
from guestmem.cpu.cpuid import DEFAULT_CPUID
from guestmem.host import Host
from guestmem.kvm.ioctl import check_vcpu_creation, encrypt_vcpu, ioctl
from guestmem.kvm.irqchip import IrqChip
from guestmem.memory import PAGE_SIZE
from guestmem.trace import Refusal
from guestmem.uapi.kvm import KVM_MEMORY_ENCRYPT_OP, VmType
from guestmem.userspace import View

CAPABILITIES, INIT_VM, INIT_VCPU, INIT_MEM_REGION, FINALIZE_VM, GET_CPUID = range(6)
VCPU = 99  # KVM_CREATE_VCPU
ON_VCPUS = (INIT_VCPU, INIT_MEM_REGION, GET_CPUID)
SIZES = (0x8000_0008, 0)
Cpuid = dict[tuple[int, int], tuple[int, int, int, int]]
GPAW_48: Cpuid = {SIZES: (48 << 16, 0, 0, 0)}


def cpuid2(table: Cpuid, padding: int = 0) -> bytes:
    entries = b"".join(struct.pack("<7I12x", *key, 0, *values) for key, values in table.items())
    return struct.pack("<II", len(table), padding) + entries


def init_vm(
    attributes: int = 0, xfam: int = 3, cpuid: Cpuid | None = None, reserved: bytes = bytes(96), padding: int = 0
) -> bytes:
    digests = b"c" * 48 + b"o" * 48 + b"w" * 48
    table = GPAW_48 if cpuid is None else cpuid
    return struct.pack("<QQ", attributes, xfam) + digests + reserved + cpuid2(table, padding)


def region(gpa: int = 0, pages: int = 1, source: int = 0) -> bytes:
    return struct.pack("<QQQ", source, gpa, pages)


def capabilities(room: int) -> bytes:
    return bytes(16 + 32 + 2000) + struct.pack("<II", room, 0)


FIELDS = {
    CAPABILITIES: capabilities(16),
    INIT_VM: init_vm(),
    INIT_MEM_REGION: region(),
    GET_CPUID: struct.pack("<II", 32, 0),
}
ORDERS = [
    # (commands, answer to the last, source)
    ([CAPABILITIES], "", "tdx_get_capabilities, at any time"),
    ([INIT_VM, CAPABILITIES], "", "tdx_get_capabilities, at any time"),
    ([FINALIZE_VM], "EINVAL tdx_op.order", "tdx_td_finalize, no HKID"),
    ([VCPU], "EIO vcpu.td_state", "tdx_vcpu_create"),
    ([INIT_VM], "", "tdx_td_init"),
    ([INIT_VM, INIT_VM], "EINVAL tdx_op.order", "tdx_td_init, TD_STATE_UNINITIALIZED"),
    ([INIT_VM, VCPU], "", "tdx_vcpu_create"),
    ([INIT_VM, VCPU, INIT_MEM_REGION], "EINVAL tdx_op.order", "tdx_vcpu_init_mem_region, VCPU_TD_STATE_INITIALIZED"),
    ([INIT_VM, VCPU, GET_CPUID], "", "tdx_vcpu_get_cpuid"),
    ([INIT_VM, VCPU, INIT_VCPU], "", "tdx_vcpu_init"),
    ([INIT_VM, VCPU, INIT_VCPU, INIT_VCPU], "EINVAL tdx_op.order", "tdx_vcpu_init, VCPU_TD_STATE_UNINITIALIZED"),
    ([INIT_VM, VCPU, INIT_VCPU, INIT_MEM_REGION], "", "tdx_vcpu_init_mem_region"),
    ([INIT_VM, VCPU, INIT_VCPU, INIT_MEM_REGION, INIT_MEM_REGION], "EIO launch.update", "TDH.MEM.PAGE.ADD, again"),
    ([INIT_VM, FINALIZE_VM], "EIO launch.finish", "TDH.MR.FINALIZE, no vCPU"),
    ([INIT_VM, VCPU, FINALIZE_VM], "EIO launch.finish", "TDH.MR.FINALIZE, a vCPU without KVM_TDX_INIT_VCPU is none"),
    ([INIT_VM, VCPU, INIT_VCPU, FINALIZE_VM], "", "tdx_td_finalize"),
    ([INIT_VM, VCPU, INIT_VCPU, FINALIZE_VM, FINALIZE_VM], "EINVAL tdx_op.order", "tdx_td_finalize, runnable"),
    ([INIT_VM, VCPU, INIT_VCPU, FINALIZE_VM, VCPU], "EIO vcpu.td_state", "tdx_vcpu_create, runnable"),
    ([INIT_VM, VCPU, INIT_VCPU, FINALIZE_VM, INIT_MEM_REGION], "EINVAL tdx_op.order", "tdx_vcpu_ioctl, runnable"),
    ([INIT_VM, VCPU, INIT_VCPU, FINALIZE_VM, GET_CPUID], "EINVAL tdx_op.order", "tdx_vcpu_ioctl, runnable"),
    ([7], "EINVAL tdx_op.command", "tdx_vm_ioctl, default"),
]


@pytest.mark.parametrize(("commands", "answer", "source"), ORDERS)
def test_commands_in_order(commands: list[int], answer: str, source: str) -> None:
    with Host(memory=1 << 20) as host:
        client = Client(host)
        answers = [client.call(command) for command in commands]
        assert answers[-1] == answer, source
        assert not any(answers[:-1]), answers


VALUES: list[tuple[int, bytes, str, str]] = [
    (INIT_VM, init_vm(attributes=SEPT_VE_DISABLE), "", "KVM_SUPPORTED_TD_ATTRS"),
    (INIT_VM, init_vm(attributes=1), "EINVAL tdx_op.attributes", "setup_tdparams, DEBUG is not KVM's"),
    (INIT_VM, init_vm(attributes=1 << 63), "EINVAL tdx_op.attributes", "setup_tdparams, PERFMON"),
    (INIT_VM, init_vm(xfam=0), "", "setup_tdparams: xfam_fixed1 is added"),
    (INIT_VM, init_vm(xfam=7), "EINVAL tdx_op.xfam", "setup_tdparams, no AVX here"),
    (INIT_VM, init_vm(reserved=b"\1" + bytes(95)), "EINVAL tdx_op.argument", "tdx_td_init"),
    (INIT_VM, init_vm(padding=1), "EINVAL tdx_op.cpuid", "tdx_td_init, cpuid.padding"),
    (INIT_VM, init_vm(cpuid={}), "EINVAL tdx_op.cpuid", "setup_tdparams_eptp_controls, no leaf 0x80000008"),
    (INIT_VM, init_vm(cpuid={SIZES: (0, 0, 0, 0)}), "EINVAL tdx_op.cpuid", "setup_tdparams_eptp_controls"),
    (INIT_VM, init_vm(cpuid={SIZES: (52 << 16, 0, 0, 0)}), "EINVAL tdx_op.cpuid", "cpu_has_vmx_ept_5levels"),
    (
        INIT_VM,
        init_vm(cpuid={**GPAW_48, (0x4000_0000, 0): (0, 0, 0, 0)}),
        "EINVAL tdx_op.cpuid",
        "setup_tdparams_cpuids, a leaf without a place",
    ),
    (
        INIT_VM,
        init_vm(cpuid={**GPAW_48, (7, 0): (0, 1 << 11, 0, 0)}),
        "EINVAL tdx_op.cpuid",
        "tdx_unsupported_cpuid, RTM",
    ),
    (
        INIT_VM,
        init_vm(cpuid={**GPAW_48, (1, 0): (0, 1, 0, 0)}),
        "EINVAL launch.start",
        "TDH.MNG.INIT, not configurable",
    ),
    (INIT_VM, struct.pack("<QQ", 0, 3) + bytes(240) + struct.pack("<II", 257, 0), "E2BIG list.too_long", "tdx_td_init"),
    (CAPABILITIES, capabilities(0), "E2BIG list.too_small", "tdx_get_capabilities"),
    (INIT_MEM_REGION, region(pages=0), "EINVAL tdx_op.argument", "tdx_vcpu_init_mem_region"),
    (INIT_MEM_REGION, region(gpa=1), "EINVAL tdx_op.argument", "tdx_vcpu_init_mem_region"),
    (INIT_MEM_REGION, region(source=1), "EINVAL tdx_op.argument", "tdx_vcpu_init_mem_region"),
    (INIT_MEM_REGION, region(gpa=1 << 47), "EINVAL tdx_op.argument", "vt_is_tdx_private_gpa, a shared address"),
    (INIT_MEM_REGION, region(gpa=(1 << 47) - 4096), "EINVAL populate.not_gmem", "the last private page, ea93efec4dda"),
    (INIT_MEM_REGION, region(gpa=(1 << 47) - 4096, pages=2), "EINVAL tdx_op.argument", "one more, ea93efec4dda"),
    (INIT_MEM_REGION, region(pages=(1 << 52) + 1), "EINVAL tdx_op.argument", "wraps to one page, aec196ba2aff"),
    (INIT_MEM_REGION, region(pages=1 << 52), "EINVAL tdx_op.argument", "tdx_vcpu_init_mem_region, wraps"),
    (INIT_MEM_REGION, region(gpa=1 << 30), "EINVAL populate.not_gmem", "kvm_gmem_populate"),
    (GET_CPUID, struct.pack("<II", 1, 0), "E2BIG list.too_small", "tdx_vcpu_get_cpuid"),
]


@pytest.mark.parametrize(("command", "fields", "answer", "source"), VALUES)
def test_fields(command: int, fields: bytes, answer: str, source: str) -> None:
    with Host(memory=1 << 20) as host:
        client = Client(host)
        if command in ON_VCPUS:
            assert not any(client.call(before) for before in (INIT_VM, VCPU, INIT_VCPU))
        assert client.call(command, fields) == answer, source


FLAGS = [
    (CAPABILITIES, 1, "EINVAL tdx_op.argument", "tdx_get_capabilities"),
    (INIT_VM, 1, "EINVAL tdx_op.argument", "tdx_td_init"),
    (INIT_VCPU, 1, "EINVAL tdx_op.argument", "tdx_vcpu_init"),
    (INIT_MEM_REGION, 1, "", "KVM_TDX_MEASURE_MEMORY_REGION"),
    (INIT_MEM_REGION, 2, "EINVAL tdx_op.argument", "tdx_vcpu_init_mem_region"),
    (GET_CPUID, 1, "", "tdx_vcpu_get_cpuid does not look"),
]


@pytest.mark.parametrize(("command", "flags", "answer", "source"), FLAGS)
def test_flags(command: int, flags: int, answer: str, source: str) -> None:
    with Host(memory=1 << 20) as host:
        client = Client(host)
        if command in ON_VCPUS:
            before = (INIT_VM, VCPU) if command == INIT_VCPU else (INIT_VM, VCPU, INIT_VCPU)
            assert not any(client.call(each) for each in before)
        assert client.call(command, flags=flags) == answer, source


def test_hw_error_must_be_zero_and_says_what_the_module_said() -> None:
    """tdx_vm_ioctl, __tdx_td_init; the status of TDH.MNG.INIT with OPERAND_ID_CPUID_CONFIG, 69."""
    with Host(memory=1 << 20) as host:
        client = Client(host)
        assert client.call(INIT_VM, hw_error=1) == "EINVAL tdx_op.hw_error"
        client.call(INIT_VM, init_vm(cpuid={**GPAW_48, (1, 0): (0, 1, 0, 0)}))
        assert client.hw_error == 0xC000_0100_0000_0045
        assert client.call(INIT_VM) == ""
        client.call(FINALIZE_VM)
        assert client.hw_error == 0xC000_0609_0000_0000  # TDX_NO_VCPUS


def test_no_vcpu_before_the_td() -> None:
    """setup_tdparams, for a VMM that could have one."""
    with Host(memory=1 << 20) as host:
        client = Client(host)
        client.vm.create_vcpu()
        assert client.call(INIT_VM) == "EBUSY tdx_op.vcpus"


def test_a_vcpu_that_was_not_initialised_never_runs() -> None:
    """tdx_vcpu_pre_run, VCPU_TD_STATE_INITIALIZED."""
    with Host(memory=1 << 20) as host:
        client = Client(host)
        assert not any(client.call(command) for command in (INIT_VM, VCPU, INIT_VCPU))
        never = client.vm.create_vcpu(1)
        assert not client.call(FINALIZE_VM)
        with pytest.raises(Refusal) as refusal:
            never.run()
        assert (refusal.value.rule, refusal.value.errno) == ("run.no_vcpu", errno.EINVAL)


def test_a_td_needs_an_apic_in_the_kernel() -> None:
    """tdx_vcpu_create, lapic_in_kernel."""
    with Host(memory=1 << 20) as host:
        client = Client(host)
        client.vm.kvm.irqchip = None
        assert not client.call(INIT_VM)
        assert client.call(VCPU) == "EINVAL vcpu.no_apic"


@pytest.mark.parametrize(
    ("call", "commands", "answer"),
    [
        ("TDH.MNG.CREATE", [INIT_VM], "EIO launch.start"),
        ("TDH.MNG.INIT", [INIT_VM], "EIO launch.start"),
        ("TDH.VP.INIT", [INIT_VM, VCPU, INIT_VCPU], "EIO tdx_op.init_vcpu"),
        ("TDH.MEM.PAGE.ADD", [INIT_VM, VCPU, INIT_VCPU, INIT_MEM_REGION], "EBUSY launch.update"),
        ("TDH.MR.FINALIZE", [INIT_VM, VCPU, INIT_VCPU, FINALIZE_VM], "EBUSY launch.finish"),
    ],
)
def test_a_busy_module(call: str, commands: list[int], answer: str) -> None:
    """__tdx_td_init, tdx_td_vcpu_init, tdx_gmem_post_populate, tdx_td_finalize; and then it is not busy any more."""
    with Host(memory=1 << 20) as host:
        client = Client(host)
        *before, last = commands
        assert not any(client.call(command) for command in before)
        client.fail(call)
        assert client.call(last) == answer
        client.fail("")
        if answer.startswith("EBUSY"):
            assert client.call(last) == ""


def test_what_the_td_is_told() -> None:
    """The values stand in the TDCS (td_params of TDH.MNG.INIT)."""
    _, _, may, _ = cpuid_configurable()[1, 0]
    with Host(memory=1 << 20) as host:
        client = Client(host)
        assert not client.call(INIT_VM, init_vm(SEPT_VE_DISABLE, 0, {**GPAW_48, (1, 0): (0, 0, may & 1 << 25, 0)}))
        params = client.guest.td.params
        assert (params.attributes, params.xfam) == (SEPT_VE_DISABLE, 3)
        assert (params.mrconfigid, params.mrowner, params.mrownerconfig) == (b"c" * 48, b"o" * 48, b"w" * 48)
        assert params.cpuid[1, 0] == (0, 0, 1 << 25, 0)
        assert params.cpuid[SIZES] == (0, 0, 0, 0), "the width is no bit of the module's"


def test_capabilities_are_what_may_be_asked_for() -> None:
    """struct kvm_tdx_capabilities: 2048 bytes, then a struct kvm_cpuid2 of 40-byte entries."""
    with Host(memory=1 << 20) as host:
        client = Client(host)
        assert not client.call(CAPABILITIES)
        data = client.answer(2048 + 8 + 40 * 3)
        assert struct.unpack_from("<QQ", data) == (SEPT_VE_DISABLE, 3)
        assert struct.unpack_from("<I", data, 2048) == (3,)
        entries = {entry[:2]: entry[3:] for entry in struct.iter_unpack("<7I12x", data[2056:])}
        assert set(entries) == {(1, 0), (7, 0), SIZES}
        assert entries[SIZES][0] >> 16 & 0xFF == 0xFF
        choice: Cpuid = {key: (values[0], values[1], values[2], values[3]) for key, values in entries.items()}
        choice[SIZES] = (48 << 16, *choice[SIZES][1:])
        choice[1, 0] = (0, *choice[1, 0][1:])
        assert not client.call(INIT_VM, init_vm(cpuid=choice)), "every bit that is offered is taken"


def test_cpuid_as_the_td_will_see_it() -> None:
    """tdx_vcpu_get_cpuid, tdx_read_cpuid: without the leaves of a hypervisor."""
    with Host(memory=1 << 20) as host:
        client = Client(host)
        assert not any(client.call(command) for command in (INIT_VM, VCPU, GET_CPUID))
        count, _ = struct.unpack_from("<II", client.answer(8))
        data = client.answer(8 + 40 * count)[8:]
        entries = {entry[:2]: entry[2:] for entry in struct.iter_unpack("<7I12x", data)}
        assert set(entries) == {key for key in DEFAULT_CPUID if key[0] >> 28 != 4}
        assert entries[0, 0][1] == DEFAULT_CPUID[0, 0][0]
        assert entries[7, 0][0] == 1, "the index is significant"
        assert entries[SIZES][1] >> 16 == 48


class Client:
    """A TDX VM with a private page at 0, and memory for arguments."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.vm = host.create_vm(VmType.TDX)
        self.vm.kvm.irqchip = IrqChip(host.scheduler.timers, is_split=True)
        self.vm.set_memory_region(0, 0, PAGE_SIZE, gmem=self.vm.create_guest_memfd(PAGE_SIZE))
        self.memory: View = host.anonymous(2 * PAGE_SIZE)
        self.hw_error = 0

    @property
    def guest(self) -> TdxGuest:
        guest = self.vm.kvm.machine.architecture
        assert isinstance(guest, TdxGuest)
        return guest

    def fail(self, name: str) -> None:
        fails: Callable[[str], bool] = lambda call: call == name  # noqa: E731
        self.guest._module._fails = fails

    def answer(self, size: int) -> bytes:
        return bytes(self.memory[64 : 64 + size])

    def call(self, command: int, fields: bytes | None = None, flags: int = 0, hw_error: int = 0) -> str:
        """The errno and rule of the refusal, if any."""
        data = FIELDS.get(command, b"") if fields is None else fields
        self.memory[0:24] = struct.pack("<IIQQ", command, flags, self.memory.hva + 64, hw_error)
        self.memory[64 : 64 + len(data)] = data
        try:
            self._call(command)
        except Refusal as refusal:
            return f"{errno.errorcode[refusal.errno or 0]} {refusal.rule}"
        finally:
            (self.hw_error,) = struct.unpack("<Q", bytes(self.memory[16:24]))
        return ""

    def _call(self, command: int) -> None:
        process, hva = self.host.process, self.memory.hva
        if command == VCPU:
            check_vcpu_creation(self.vm.kvm)
            self.vm.create_vcpu()
        elif command in ON_VCPUS:
            self.host.run(encrypt_vcpu(process, self.vm.kvm.vcpus[0], hva), "ioctl")
        else:
            self.host.run(ioctl(process, self.vm.fd, KVM_MEMORY_ENCRYPT_OP, hva), "ioctl")
