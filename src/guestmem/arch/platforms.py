"""The architectures that a machine has, by type of VM: here more than any one machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from guestmem.arch.architecture import Platform
from guestmem.arch.cca import CcaPlatform
from guestmem.arch.pkvm import PkvmPlatform
from guestmem.arch.snp import SnpPlatform
from guestmem.arch.sw import SoftwarePlatform
from guestmem.arch.tdx import TdxPlatform
from guestmem.uapi.kvm import VmType


def new_platforms(
    pages: int, orders: tuple[int, ...], fails: Callable[[str], bool], scramble: bool
) -> Mapping[VmType, Platform]:
    """`pages` is how many the tables cover, `orders` those of leaves, largest first: table entries have the last two.
    `fails` is asked before each fallible call; `scramble` is what conversions do to software-protected VMs."""
    large_order = orders[-2] if len(orders) > 1 else 0
    return {
        VmType.DEFAULT: SoftwarePlatform(has_private_memory=False),
        VmType.SW_PROTECTED: SoftwarePlatform(has_private_memory=True, scramble=scramble),
        VmType.SNP: SnpPlatform(pages, large_order=large_order, fails=fails),
        VmType.TDX: TdxPlatform(fails=fails),
        VmType.ARM_REALM: CcaPlatform(fails=fails),
        VmType.ARM_PROTECTED: PkvmPlatform(fails=fails),
    }
