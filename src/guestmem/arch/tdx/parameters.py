"""TD_PARAMS: what a TD is to be like, and what of it the module lets a host choose.

A bit of an attribute or of XFAM is fixed to 0, fixed to 1, or the host's. CPUID values of a TD are the machine's but
for the bits that are configurable, which are as the host says. All stand in the TDCS and in the TD's reports.

Source: TDX module ABI specification, "TD_PARAMS", "ATTRIBUTES", "XFAM"; intel/tdx-module tdh_mng_init.c
read_and_set_td_configurations, read_and_set_cpuid_configurations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

from guestmem.arch.tdx.status import Operand, Status, TdxError
from guestmem.cpu.cpuid import DEFAULT_CPUID

Registers: TypeAlias = tuple[int, int, int, int]
CpuidValues: TypeAlias = Mapping[tuple[int, int], Registers]

DEBUG = 1 << 0
SEPT_VE_DISABLE = 1 << 28
ATTRIBUTES_FIXED0 = DEBUG | SEPT_VE_DISABLE  # bits that may be one
ATTRIBUTES_FIXED1 = 0  # bits that must be
XFAM_FIXED0 = XFAM_FIXED1 = 0b11  # x87 and SSE, which no machine is without; the engine has no more
MR_BYTES = 48

_FAMILY_MODEL_STEPPING = 0x0FFF_3FFF
_MASKS: CpuidValues = {
    (1, 0): (_FAMILY_MODEL_STEPPING, 0, 0x7FFF_FFFF, 0),  # the bit of a hypervisor is always there
    (7, 0): (0, 0xFFFF_FFFF, 0xFFFF_FFFF, 0),
    (0x8000_0008, 0): (0, 0xFFFF_FFFF, 0, 0),
}


class TdParams(NamedTuple):
    """`cpuid` has the configurable bits of leaves by leaf and subleaf; a leaf that is not there has none of them.
    `mrconfigid`, `mrowner` and `mrownerconfig` are digests of 48 bytes that mean something to the TD's owner."""

    attributes: int = 0
    xfam: int = XFAM_FIXED1
    cpuid: CpuidValues = MappingProxyType({})
    mrconfigid: bytes = bytes(MR_BYTES)
    mrowner: bytes = bytes(MR_BYTES)
    mrownerconfig: bytes = bytes(MR_BYTES)


DEFAULT_PARAMS = TdParams()


def cpuid_configurable() -> CpuidValues:
    """The bits that a host may choose: of what this machine has."""
    return {
        key: _combine(masks, DEFAULT_CPUID.get(key, (0, 0, 0, 0)), lambda mask, native: mask & native)
        for key, masks in _MASKS.items()
    }


def check(call: str, params: TdParams) -> None:
    """Raises: TdxError TDX_OPERAND_INVALID for the first field that the module does not take."""
    for value, fixed0, fixed1, operand in (
        (params.attributes, ATTRIBUTES_FIXED0, ATTRIBUTES_FIXED1, Operand.ATTRIBUTES),
        (params.xfam, XFAM_FIXED0, XFAM_FIXED1, Operand.XFAM),
    ):
        if value & ~fixed0 or fixed1 & ~value:
            raise TdxError(call, Status.OPERAND_INVALID, operand, value=value, may=fixed0, must=fixed1)
    may = cpuid_configurable()
    native = DEFAULT_CPUID[1, 0][0]
    for key, values in params.cpuid.items():
        mask = may.get(key, (0, 0, 0, 0))
        if any(value & ~bits for value, bits in zip(values, mask, strict=True)):
            raise TdxError(call, Status.OPERAND_INVALID, Operand.CPUID_CONFIG, leaf=key[0], subleaf=key[1])
        if key == (1, 0) and values[0] not in (0, native & _FAMILY_MODEL_STEPPING):
            raise TdxError(call, Status.OPERAND_INVALID, Operand.CPUID_CONFIG, leaf=1, family_model=values[0])


def cpuid_of(params: TdParams) -> dict[tuple[int, int], Registers]:
    """What CPUID answers in the TD, by leaf and subleaf."""
    answers: dict[tuple[int, int], Registers] = dict(DEFAULT_CPUID)
    for key, mask in cpuid_configurable().items():
        chosen = params.cpuid.get(key, (0, 0, 0, 0))
        if key == (1, 0):
            mask = (0, *mask[1:])  # another family than the machine's is refused
        kept = _combine(answers.get(key, (0, 0, 0, 0)), mask, lambda native, bits: native & ~bits)
        answers[key] = _combine(kept, _combine(chosen, mask, int.__and__), int.__or__)
    return answers


def _combine(left: Registers, right: Registers, by: Callable[[int, int], int]) -> Registers:
    a, b, c, d = (by(one, other) for one, other in zip(left, right, strict=True))
    return a, b, c, d
