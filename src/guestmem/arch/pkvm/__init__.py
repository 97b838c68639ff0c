"""pKVM: the hypervisor's page states, and a Platform made of them. Start with `platform.py`."""

from guestmem.arch.pkvm.hypervisor import Hypervisor, PageState
from guestmem.arch.pkvm.platform import PkvmGuest, PkvmPlatform

__all__ = ["Hypervisor", "PageState", "PkvmGuest", "PkvmPlatform"]
