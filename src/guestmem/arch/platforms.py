"""The architectures that a machine has, by type of VM: here more than any one machine."""

from __future__ import annotations

from collections.abc import Callable

from guestmem.arch.architecture import Platform
from guestmem.arch.cca import CcaPlatform
from guestmem.arch.pkvm import PkvmPlatform
from guestmem.arch.snp import SnpPlatform
from guestmem.arch.sw import SoftwarePlatform
from guestmem.arch.tdx import TdxPlatform
from guestmem.uapi.kvm import VmType


class Platforms(dict[VmType, Platform]):
    """By type of VM, each made when the first VM of its type asks: most machines have VMs of one type, and an explorer
    makes a machine for each execution.

    `pages` is how many the tables cover, `orders` those of leaves, largest first: table entries have the last two.
    `fails` is asked before each fallible call; `scramble` is what conversions do to software-protected VMs.
    """

    def __init__(self, pages: int, orders: tuple[int, ...], fails: Callable[[str], bool], scramble: bool) -> None:
        super().__init__()
        large_order = orders[-2] if len(orders) > 1 else 0
        self._new: dict[VmType, Callable[[], Platform]] = {
            VmType.DEFAULT: lambda: SoftwarePlatform(has_private_memory=False),
            VmType.SW_PROTECTED: lambda: SoftwarePlatform(has_private_memory=True, scramble=scramble),
            VmType.SNP: lambda: SnpPlatform(pages, large_order=large_order, fails=fails),
            VmType.TDX: lambda: TdxPlatform(fails=fails),
            VmType.ARM_REALM: lambda: CcaPlatform(fails=fails),
            VmType.ARM_PROTECTED: lambda: PkvmPlatform(fails=fails),
        }

    def __missing__(self, vm_type: VmType) -> Platform:
        platform = self[vm_type] = self._new[vm_type]()
        return platform
