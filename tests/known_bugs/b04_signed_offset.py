"""B04: the end of a bound range is computed as a signed number and wraps."""

import errno

from guestmem.check.mutants import mutant
from guestmem.trace import Refusal


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 & 1 else number


@mutant("B04", replaces="guestmem.kvm.set_region:_check_inside_file", breaks={"S5", "S16", "never"})
def signed_offset(offset: int, size: int, file_size: int, signed: bool) -> None:
    """loff_t offset + size > i_size: an end of 2**63 is negative and passes."""
    if _signed(offset + size) > file_size:
        raise Refusal(errno.EINVAL, "bind.past_end", offset=offset, size=size, file_size=file_size)
