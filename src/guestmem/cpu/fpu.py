"""FPU and SSE state as images: FXSAVE's 512 bytes, and XSAVE's area of them and a header.

Unicorn keeps no last instruction, operand and opcode of the FPU (FIP, FDP, FOP): they are stored and given back.

Source: Intel SDM vol. 1, 10.5.1 "FXSAVE area" and 13.4 "XSAVE area"; QEMU fpu_helper.c do_xsave_fpu.
"""

from __future__ import annotations

import ctypes
import struct

from unicorn import x86_const

from guestmem.cpu import uc_native

LEGACY, AREA = 512, 576
XCR0_X87, XCR0_SSE = 1, 2
SUPPORTED = XCR0_X87 | XCR0_SSE
"""The bits of XCR0 that Unicorn has state for."""

_HEAD = struct.Struct("<HHBxHQQII")  # FCW FSW FTW FOP FIP FDP MXCSR MXCSR_MASK
_HEADER = struct.Struct("<QQ")  # XSTATE_BV XCOMP_BV
_MXCSR_MASK = 0xFFFF
_ST, _XMM = 32, 160
_FPCW, _FPSW, _FPTAG = x86_const.UC_X86_REG_FPCW, x86_const.UC_X86_REG_FPSW, x86_const.UC_X86_REG_FPTAG
_FIP, _FDP, _FOP = x86_const.UC_X86_REG_FIP, x86_const.UC_X86_REG_FDP, x86_const.UC_X86_REG_FOP
_INITIAL = _HEAD.pack(0x37F, 0, 0, 0, 0, 0, 0x1F80, _MXCSR_MASK).ljust(LEGACY, b"\0")


def get_fpu(handle: int) -> bytes:
    """The FXSAVE64 image of the CPU behind `handle`."""
    words = (_read(handle, register) for register in (_FPCW, _FPSW, _FPTAG, _FOP, _FIP, _FDP))
    control, status, tags, opcode, instruction, operand = words
    # Two bits for each register, 3 for an empty one; FXSAVE has one bit, set for one in use.
    used = sum(1 << i for i in range(8) if tags >> 2 * i & 3 != 3)
    mxcsr = _read(handle, x86_const.UC_X86_REG_MXCSR)
    image = bytearray(_HEAD.pack(control, status, used, opcode, instruction, operand, mxcsr, _MXCSR_MASK))
    image += bytes(LEGACY - len(image))
    for i in range(8):
        image[_ST + i * 16 : _ST + i * 16 + 10] = _read_bytes(handle, _physical(status, i), 10)
    for i in range(16):
        image[_XMM + i * 16 : _XMM + i * 16 + 16] = _read_bytes(handle, x86_const.UC_X86_REG_XMM0 + i, 16)
    return bytes(image)


def set_fpu(handle: int, image: bytes) -> None:
    """Raises: ValueError, if it is too short or MXCSR has reserved bits."""
    if len(image) < LEGACY:
        raise ValueError(f"FXSAVE image of {len(image)} bytes: need {LEGACY}")
    control, status, used, opcode, instruction, operand, mxcsr, _ = _HEAD.unpack_from(image)
    if mxcsr & ~_MXCSR_MASK:
        raise ValueError(f"MXCSR {mxcsr:#x}: reserved bits")
    tags = sum(0 if used >> i & 1 else 3 << 2 * i for i in range(8))
    for register, value in (
        (_FPCW, control), (_FPSW, status), (_FPTAG, tags), (_FOP, opcode), (_FIP, instruction), (_FDP, operand),
        (x86_const.UC_X86_REG_MXCSR, mxcsr),
    ):  # fmt: skip
        _write_bytes(handle, register, value.to_bytes(8, "little"))
    for i in range(8):
        _write_bytes(handle, _physical(status, i), image[_ST + i * 16 : _ST + i * 16 + 10])
    for i in range(16):
        _write_bytes(handle, x86_const.UC_X86_REG_XMM0 + i, image[_XMM + i * 16 : _XMM + i * 16 + 16])


def get_xsave(handle: int) -> bytes:
    """The XSAVE area in standard form, with x87 and SSE marked as in use."""
    return get_fpu(handle) + _HEADER.pack(SUPPORTED, 0).ljust(AREA - LEGACY, b"\0")


def set_xsave(handle: int, area: bytes) -> None:
    """Raises: ValueError, for state that there is not, the compact form, or what `set_fpu` refuses."""
    if len(area) < AREA:
        raise ValueError(f"XSAVE area of {len(area)} bytes: need {AREA}")
    present, compact = _HEADER.unpack_from(area, LEGACY)
    if present & ~SUPPORTED or compact or any(area[LEGACY + _HEADER.size : AREA]):
        raise ValueError(f"XSTATE_BV {present:#x}, XCOMP_BV {compact:#x}: need at most {SUPPORTED:#x} and 0")
    image = bytearray(area[:LEGACY])
    if not present & XCR0_X87:
        image[:24], image[_ST:_XMM] = _INITIAL[:24], _INITIAL[_ST:_XMM]
    if not present & XCR0_SSE:
        image[_XMM : _XMM + 256] = bytes(256)
    set_fpu(handle, bytes(image))


def _physical(status: int, i: int) -> int:
    """The register that is ST(`i`), by Unicorn's number: the top of the stack is in FSW."""
    return int(x86_const.UC_X86_REG_FP0) + (i + (status >> 11) & 7)


def _read(handle: int, register: int) -> int:
    return int.from_bytes(_read_bytes(handle, register, 8), "little")


def _read_bytes(handle: int, register: int, size: int) -> bytes:
    buffer = ctypes.create_string_buffer(16)
    uc_native.check(uc_native.reg_read(handle, register, buffer), f"read register {register}")
    return buffer.raw[:size]


def _write_bytes(handle: int, register: int, value: bytes) -> None:
    uc_native.check(uc_native.reg_write(handle, register, value), f"write register {register}")
