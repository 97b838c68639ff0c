"""Arm CCA: the Realm Management Monitor's calls, and a Platform made of them. Start with `platform.py`."""

from guestmem.arch.cca.monitor import Monitor
from guestmem.arch.cca.platform import NOT_MEASURED, CcaGuest, CcaPlatform

__all__ = ["NOT_MEASURED", "CcaGuest", "CcaPlatform", "Monitor"]
