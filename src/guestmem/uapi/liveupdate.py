"""/dev/liveupdate: numbers and structures. Every structure says its size in its first word.

Source: include/uapi/linux/liveupdate.h, from 6.19 on.
"""

from __future__ import annotations

import struct

_TYPE = 0xBA << 8

LIVEUPDATE_IOCTL_CREATE_SESSION = _TYPE | 0x00
LIVEUPDATE_IOCTL_RETRIEVE_SESSION = _TYPE | 0x01
LIVEUPDATE_SESSION_PRESERVE_FD = _TYPE | 0x40
LIVEUPDATE_SESSION_RETRIEVE_FD = _TYPE | 0x41
LIVEUPDATE_SESSION_FINISH = _TYPE | 0x42

SESSION = struct.Struct("<Ii64s")  # size, fd (out), name
SESSION_FD = struct.Struct("<IiQ")  # size, fd (in or out), token
SESSION_FINISH = struct.Struct("<II")  # size, reserved
FD_AT = 4
"""Where the two that return a descriptor write it."""
