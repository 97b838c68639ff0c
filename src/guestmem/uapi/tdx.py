"""Numbers and structures of KVM_MEMORY_ENCRYPT_OP on a TDX VM and its vCPUs, besides those in `kvm`.

Source: arch/x86/include/uapi/asm/kvm.h enum kvm_tdx_cmd_id, struct kvm_tdx_*, struct kvm_cpuid2.
"""

from __future__ import annotations

import struct

KVM_TDX_CAPABILITIES = 0
KVM_TDX_GET_CPUID = 5

COMMAND = struct.Struct("<IIQQ")  # struct kvm_tdx_cmd: id, flags, data, hw_error
HW_ERROR_OFFSET = 16
CAPABILITIES = struct.Struct("<QQ4Q250Q")  # supported_attrs, supported_xfam, tdvmcallinfo, reserved; a cpuid2 follows
INIT_VM = struct.Struct("<QQ48s48s48s96s")  # attributes, xfam, mrconfigid, mrowner, mrownerconfig; a cpuid2 follows
MEM_REGION = struct.Struct("<QQQ")  # struct kvm_tdx_init_mem_region: source_addr, gpa, nr_pages
CPUID2 = struct.Struct("<II")  # nent, padding; so many of the next follow
CPUID_ENTRY2 = struct.Struct("<IIIIIII12x")  # function, index, flags, eax, ebx, ecx, edx
KVM_CPUID_FLAG_SIGNIFCANT_INDEX = 1
KVM_MAX_CPUID_ENTRIES = 256
