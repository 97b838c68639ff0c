"""The signals that an access of a host process can end in, as Python exceptions.

A script must not die where a client would: the guarded access raises in place of the signal. si_code values are those
of asm-generic/siginfo.h.
"""

from __future__ import annotations

from guestmem.trace import Refusal

BUS_ADRERR = 2
BUS_MCEERR_AR = 4
SEGV_MAPERR = 1
SEGV_ACCERR = 2


class SigBus(Exception):
    """The page is not the process's to touch: private, past the end, or poisoned.

    `hva` is si_addr, `code` is BUS_ADRERR or BUS_MCEERR_AR, `reason` the provider's refusal with its rule.
    """

    def __init__(self, hva: int, code: int, reason: Refusal) -> None:
        self.hva = hva
        self.code = code
        self.reason = reason
        super().__init__(f"SIGBUS at {hva:#x}, si_code {code}: {reason}")


class SigSegv(Exception):
    """No mapping at `hva` (SEGV_MAPERR), or one that does not allow the access (SEGV_ACCERR)."""

    def __init__(self, hva: int, code: int) -> None:
        self.hva = hva
        self.code = code
        super().__init__(f"SIGSEGV at {hva:#x}, si_code {code}")
