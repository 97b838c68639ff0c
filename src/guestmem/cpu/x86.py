"""Bits of control registers and of page-table entries. Source: Intel SDM vol. 3, chapters 2 and 5."""

from __future__ import annotations

CR0_PE, CR0_WP, CR0_PG = 1 << 0, 1 << 16, 1 << 31
CR4_PSE, CR4_PAE, CR4_MCE, CR4_LA57, CR4_SMEP, CR4_SMAP = (1 << bit for bit in (4, 5, 6, 12, 20, 21))
EFER_SCE, EFER_LME, EFER_LMA, EFER_NXE = 1 << 0, 1 << 8, 1 << 10, 1 << 11

PTE_P, PTE_W, PTE_U, PTE_A, PTE_D, PTE_PS, PTE_NX = 1 << 0, 1 << 1, 1 << 2, 1 << 5, 1 << 6, 1 << 7, 1 << 63
PTE_ADDRESS = 0x000F_FFFF_FFFF_F000
