"""Numbers and structures of KVM_MEMORY_ENCRYPT_OP on an SNP VM, besides those in `kvm`.

Source: arch/x86/include/uapi/asm/kvm.h enum sev_cmd_id, struct kvm_sev_*, KVM_X86_GRP_SEV.
"""

from __future__ import annotations

import struct

from guestmem.uapi.kvm import KVM_SEV_INIT2

KVM_SEV_INIT, KVM_SEV_ES_INIT = 0, 1
KVM_SEV_LAUNCH_UPDATE_VMSA = 4
KVM_SEV_GUEST_STATUS = 16
KVM_SEV_DBG_DECRYPT, KVM_SEV_DBG_ENCRYPT = 17, 18
KVM_SEV_SNP_ENABLE_REQ_CERTS = 103
COMMANDS_OF_SEV = frozenset(range(KVM_SEV_INIT2)) - {10, 14, 19}
"""Those of guests before SNP that KVM has; three numbers stand for commands that it never got."""

KVM_X86_GRP_SEV = 1
KVM_X86_SEV_VMSA_FEATURES = 0
KVM_X86_SNP_POLICY_BITS = 1
KVM_X86_SEV_SNP_REQ_CERTS = 2

GHCB_VERSION_MAX = 2
GHCB_VERSION_OF_SNP = 2

COMMAND = struct.Struct("<IIQII")  # struct kvm_sev_cmd: id, pad, data, error, sev_fd
ERROR_OFFSET = 16
INIT = struct.Struct("<QIHH8I")  # struct kvm_sev_init
SNP_LAUNCH_START = struct.Struct("<Q16sH6x4Q")
SNP_LAUNCH_UPDATE = struct.Struct("<QQQBBHI4Q")
SNP_LAUNCH_FINISH = struct.Struct("<QQBBB32s3xH4Q")
