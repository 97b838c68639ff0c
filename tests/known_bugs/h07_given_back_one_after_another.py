"""H07: pages of a conversion are given back one after another, and firmware refuses one in the middle.

In-place v8's make_shared goes over the range page by page, and what it gave back before an error stays the host's.
"""

from collections.abc import Sequence

from guestmem.arch import Block
from guestmem.arch.snp import SnpGuest
from guestmem.check.mutants import mutant


@mutant("H07", replaces="guestmem.arch.snp.guest:SnpGuest.make_shared", breaks={"S15"})
def given_back_one_after_another(self: SnpGuest, blocks: Sequence[Block]) -> None:
    """Nothing goes first, and nothing is undone: the bytes of a page that stays private are ciphertext."""
    for block in blocks:
        self._smash_what_sticks_out(block)
        for entry, part in self._entries(block):
            self._take(entry, part)
