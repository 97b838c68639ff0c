/* CPUID, from the table that who steers has given. */
#include "inside.h"

static bool is_indexed(uint32_t leaf)
{
    switch (leaf) {
    case 4: case 7: case 0xb: case 0xd: case 0xf: case 0x10: case 0x12: case 0x14: case 0x17: case 0x18: case 0x1d:
    case 0x1e: case 0x1f: case 0x8000001d: case 0x80000026:
        return true;
    default:
        return false;
    }
}

/* Subleaf 0 also answers for leaves that have none; zeros for a leaf that the table does not have. */
void cpuid_lookup(const struct cpu_block *block, uint32_t leaf, uint32_t subleaf, uint32_t out[4])
{
    out[0] = out[1] = out[2] = out[3] = 0;
    for (uint32_t i = 0; i < block->cpuid_count && i < CPU_CPUID_MAX; i++) {
        const struct kvm_cpuid_entry2 *entry = &block->cpuid[i];
        bool any_subleaf = !is_indexed(leaf) && !(entry->flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX) && !entry->index;
        if (entry->function != leaf || (entry->index != subleaf && !any_subleaf))
            continue;
        out[0] = entry->eax;
        out[1] = entry->ebx;
        out[2] = entry->ecx;
        out[3] = entry->edx;
        return;
    }
}
