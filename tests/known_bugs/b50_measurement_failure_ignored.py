"""B50, ad44aa4c5d3f: a page is added, extending the measurement by it fails, and the TD may go on."""

from guestmem.arch import FirmwareError
from guestmem.arch.tdx import TdxGuest
from guestmem.check.mutants import mutant
from guestmem.memory import PAGE_SIZE


@mutant("B50", replaces="guestmem.arch.tdx.platform:TdxGuest._measure", breaks={"S12", "S15", "S18"})
def measurement_failure_ignored(self: TdxGuest, gfn: int) -> None:
    """The ioctl fails, and nothing else: the VM is not dead."""
    try:
        for gpa in range(gfn * PAGE_SIZE, (gfn + 1) * PAGE_SIZE, 256):
            self._module.mr_extend(self.tdr, gpa)
    except FirmwareError as error:
        raise FirmwareError(error.call, error.code, gpa=gpa) from error
