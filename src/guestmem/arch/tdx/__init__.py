"""Intel TDX: the TDX module's calls, and a Platform made of them. Start with `platform.py`."""

from guestmem.arch.tdx.memory_calls import MachineCheck, MemoryCalls
from guestmem.arch.tdx.parameters import TdParams
from guestmem.arch.tdx.platform import NOT_MEASURED, TdxGuest, TdxPlatform

__all__ = ["NOT_MEASURED", "MachineCheck", "MemoryCalls", "TdParams", "TdxGuest", "TdxPlatform"]
