"""User 1 of the provider: host processes, their mappings, the signals on private pages, and pins."""

from guestmem.userspace.address_space import AddressSpace, MmuNotifier
from guestmem.userspace.gup import Pin
from guestmem.userspace.process import FdTable, OpenFile, Process, Userspace
from guestmem.userspace.signals import BUS_ADRERR, BUS_MCEERR_AR, SigBus, SigSegv
from guestmem.userspace.view import View

__all__ = [
    "BUS_ADRERR",
    "BUS_MCEERR_AR",
    "AddressSpace",
    "FdTable",
    "MmuNotifier",
    "OpenFile",
    "Pin",
    "Process",
    "SigBus",
    "SigSegv",
    "Userspace",
    "View",
]
