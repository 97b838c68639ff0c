"""The firmware of the AMD secure processor (AMD-SP): guest contexts, ASIDs and the launch of a guest.

    GCTX_CREATE -> LAUNCH_START -> ACTIVATE -> LAUNCH_UPDATE ... -> LAUNCH_FINISH -> running -> DECOMMISSION

Each command returns a status by its name in SEV_STATUS. An ASID that was decommissioned is dirty until DF_FLUSH: its
cache lines are still about.

Source: SEV Secure Nested Paging Firmware ABI Specification, chapters 4 (guest context) and 8 (commands);
`status.py` for the numbers.
"""

from __future__ import annotations

import dataclasses
import enum
import struct
from collections.abc import Callable

from guestmem.arch.snp import policy as guest_policy
from guestmem.arch.snp.digest import DIGEST_BYTES, VMSA_GPA, PageType, extend
from guestmem.arch.snp.id_block import NO_ID_BLOCK, Attested, LaunchFinish, check
from guestmem.arch.snp.rmp import Rmp
from guestmem.arch.snp.status import SevStatus as SevStatus
from guestmem.memory import PAGE_SHIFT, PAGE_SIZE, Pfn

CPUID_ENTRIES = 64
_CPUID_HEADER = struct.Struct("<IIQ")
_CPUID_ENTRY = struct.Struct("<IIQQIIIIQ")
_VMX = 1 << 5  # of CPUID leaf 1, ECX: no AMD processor has it
POLICY_RESERVED_1 = guest_policy.RESERVED_1
ABI_VERSION = (1, 55)


class GuestState(enum.Enum):
    """GSTATE of a guest context."""

    INIT = "init"
    LAUNCH = "launch"
    RUNNING = "running"


@dataclasses.dataclass(slots=True)
class Context:
    """A guest context page (GCTX): firmware's, and opaque to the host."""

    state: GuestState = GuestState.INIT
    asid: int = 0
    digest: bytes = bytes(DIGEST_BYTES)
    policy: int = 0
    attested: Attested | None = None
    decommissioned: bool = False


class Firmware:
    """`contexts` is how many guest contexts it can have, `smt` whether the machine's cores have two threads: here they
    have one. `fails` is asked before each command."""

    def __init__(
        self, rmp: Rmp, contexts: int = 1024, smt: bool = False, fails: Callable[[str], bool] = lambda _: False
    ) -> None:
        self.contexts: list[Context] = []
        self.dirty_asids: set[int] = set()
        self._rmp = rmp
        self._limit = contexts
        self._smt = smt
        self._fails = fails

    def gctx_create(self) -> Context | SevStatus:
        """SNP_GCTX_CREATE."""
        if len(self.contexts) >= self._limit or self._fails("snp: GCTX_CREATE"):
            return SevStatus.RESOURCE_LIMIT
        context = Context()
        self.contexts.append(context)
        return context

    def launch_start(self, context: Context, policy: int) -> SevStatus:
        """SNP_LAUNCH_START, where the machine can meet the policy."""
        if context.decommissioned or context not in self.contexts:
            return SevStatus.INVALID_GUEST
        if context.state is not GuestState.INIT:
            return SevStatus.INVALID_GUEST_STATE
        if not guest_policy.is_met(policy, ABI_VERSION, self._smt) or self._fails("snp: LAUNCH_START"):
            return SevStatus.POLICY_FAILURE
        context.policy = policy
        context.state = GuestState.LAUNCH
        return SevStatus.SUCCESS

    def activate(self, context: Context, asid: int) -> SevStatus:
        """SNP_ACTIVATE: memory of `asid` is encrypted with the guest's key from now on."""
        if context.decommissioned or context not in self.contexts:
            return SevStatus.INVALID_GUEST
        if context.state is GuestState.INIT:
            return SevStatus.INVALID_GUEST_STATE
        if context.asid:
            return SevStatus.ACTIVE
        if asid <= 0:
            return SevStatus.INVALID_ASID
        if any(other.asid == asid for other in self.contexts):
            return SevStatus.ASID_OWNED
        if asid in self.dirty_asids:
            return SevStatus.DFFLUSH_REQUIRED
        if self._fails("snp: ACTIVATE"):
            return SevStatus.INVALID_PLATFORM_STATE
        context.asid = asid
        return SevStatus.SUCCESS

    def launch_update(
        self, context: Context, gfn: int, pfn: Pfn, page_type: PageType, contents: bytes
    ) -> tuple[SevStatus, bytes | None]:
        """SNP_LAUNCH_UPDATE of one 4K page; the status, and the page as it should be where a CPUID page is refused.

        The page must be firmware's for this guest: assigned to its ASID, immutable, small. It is the guest's and valid
        afterwards.
        """
        if context.decommissioned or context not in self.contexts:
            return SevStatus.INVALID_GUEST, None
        if context.state is not GuestState.LAUNCH:
            return SevStatus.INVALID_GUEST_STATE, None
        if not context.asid:
            return SevStatus.INACTIVE, None
        found = self._rmp.lookup(pfn)
        if found is None or not found[1].immutable or found[1].validated:
            return SevStatus.INVALID_PAGE_STATE, None
        entry = found[1]
        if entry.large:
            return SevStatus.INVALID_PAGE_SIZE, None
        if entry.asid != context.asid or entry.gfn != gfn:
            return SevStatus.INVALID_PAGE_OWNER, None
        if page_type is PageType.CPUID and (corrected := correct_cpuid(contents)) != contents:
            return SevStatus.INVALID_PARAM, corrected
        if self._fails("snp: LAUNCH_UPDATE"):
            return SevStatus.INVALID_PLATFORM_STATE, None
        gpa = VMSA_GPA if page_type is PageType.VMSA else gfn << PAGE_SHIFT
        context.digest = extend(context.digest, page_type, gpa, contents)
        entry.immutable = False
        entry.validated = True
        entry.vmsa = page_type is PageType.VMSA
        return SevStatus.SUCCESS, None

    def launch_finish(self, context: Context, finish: LaunchFinish = NO_ID_BLOCK) -> SevStatus:
        """SNP_LAUNCH_FINISH: if there is an ID block, the guest must be what it says."""
        if context.decommissioned or context not in self.contexts:
            return SevStatus.INVALID_GUEST
        if context.state is not GuestState.LAUNCH:
            return SevStatus.INVALID_GUEST_STATE
        if not context.asid:
            return SevStatus.INACTIVE
        if self._fails("snp: LAUNCH_FINISH"):
            return SevStatus.INVALID_PLATFORM_STATE
        attested = check(finish, context.digest, context.policy)
        if isinstance(attested, SevStatus):
            return attested
        context.attested = attested
        context.state = GuestState.RUNNING
        return SevStatus.SUCCESS

    def page_reclaim(self, pfn: Pfn) -> SevStatus:
        """SNP_PAGE_RECLAIM: firmware gives up its hold of an immutable page, which stays assigned."""
        if self._fails("snp: PAGE_RECLAIM"):
            return SevStatus.INVALID_PLATFORM_STATE
        return SevStatus.SUCCESS if self._rmp.reclaim(pfn) else SevStatus.INVALID_PAGE_STATE

    def decommission(self, context: Context) -> SevStatus:
        """SNP_DECOMMISSION, once for each context. The ASID is free, and dirty."""
        if context.decommissioned or context not in self.contexts:
            return SevStatus.INVALID_GUEST
        if self._fails("snp: DECOMMISSION"):
            return SevStatus.INVALID_PLATFORM_STATE
        context.decommissioned = True
        self.contexts.remove(context)
        if context.asid:
            self.dirty_asids.add(context.asid)
        return SevStatus.SUCCESS

    def df_flush(self) -> SevStatus:
        """SNP_DF_FLUSH, after WBINVD on every CPU: ASIDs that were decommissioned are clean."""
        if self._fails("snp: DF_FLUSH"):
            return SevStatus.INVALID_PLATFORM_STATE
        self.dirty_asids.clear()
        return SevStatus.SUCCESS


def correct_cpuid(page: bytes) -> bytes:
    """A CPUID page as firmware would have it: no more entries than there is room for, no feature that no processor of
    this make has. Firmware compares with its processor; this one knows a single bit of it, VMX."""
    count, reserved, more = _CPUID_HEADER.unpack_from(page)
    count = min(count, CPUID_ENTRIES)
    corrected = bytearray(page)
    _CPUID_HEADER.pack_into(corrected, 0, count, reserved, more)
    for number in range(count):
        offset = _CPUID_HEADER.size + number * _CPUID_ENTRY.size
        leaf, *rest, eax, ebx, ecx, edx, zero = _CPUID_ENTRY.unpack_from(page, offset)
        if leaf == 1:
            _CPUID_ENTRY.pack_into(corrected, offset, leaf, *rest, eax, ebx, ecx & ~_VMX, edx, zero)
    assert len(corrected) == PAGE_SIZE
    return bytes(corrected)
