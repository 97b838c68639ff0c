"""AMD SEV-SNP: the RMP, the firmware, memory encryption, and what KVM does with them. Start with `rmp.py`."""

from guestmem.arch.snp.guest import C_BIT, SnpGuest, SnpPlatform

__all__ = ["C_BIT", "SnpGuest", "SnpPlatform"]
