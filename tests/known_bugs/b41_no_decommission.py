"""B41, 934002cd660b: ACTIVATE fails, and the context that LAUNCH_START made stays in firmware."""

from guestmem.arch import FirmwareError
from guestmem.arch.snp.firmware import SevStatus
from guestmem.arch.snp.guest import SnpGuest
from guestmem.arch.snp.policy import DEFAULT
from guestmem.check.mutants import mutant


@mutant("B41", replaces="guestmem.arch.snp.guest:SnpGuest.start", breaks={"L3"})
def no_decommission(self: SnpGuest, parameters: int | None = None) -> None:
    """The error path skips decommission."""
    policy = DEFAULT if parameters is None else parameters
    context = self.platform.firmware.gctx_create()
    if isinstance(context, SevStatus):
        raise FirmwareError("SNP_GCTX_CREATE", context.name)
    for call, status in (
        ("SNP_LAUNCH_START", self.platform.firmware.launch_start(context, policy)),
        ("SNP_ACTIVATE", self._activate(context)),
    ):
        if status is not SevStatus.SUCCESS:
            raise FirmwareError(call, status.name, asid=self.asid)
    self.context = context
