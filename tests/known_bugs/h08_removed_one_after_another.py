"""H08: pages of a conversion leave the TD one after another, and the module is busy for one in the middle.

tdx_sept_remove_private_spte blocks, tracks and removes one leaf after another (Linux 6.18), and a removed page is gone.
"""

from collections.abc import Sequence

from guestmem.arch import Block, FirmwareError
from guestmem.arch.tdx import TdxGuest
from guestmem.check.mutants import mutant


@mutant("H08", replaces="guestmem.arch.tdx.platform:TdxGuest.make_shared", breaks={"S15"})
def removed_one_after_another(self: TdxGuest, blocks: Sequence[Block]) -> None:
    """The first page is zeros when the second cannot be blocked, and stays the guest's."""
    for block in blocks:
        try:
            self.reclaim(block)
        except FirmwareError as error:
            error.facts["pfn"] = block.pfn
            raise
