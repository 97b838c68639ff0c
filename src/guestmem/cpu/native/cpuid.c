/* CPUID: the lookup in the block's table, the bits that follow the state of the CPU, and what we take from it ourselves. */
#include "internal.h"

#include <string.h>

/* Zeros for a leaf that the table does not have. */
void cpuid_lookup(const struct cpu_block *block, uint32_t leaf, uint32_t subleaf, uint32_t answer[4])
{
    memset(answer, 0, 16);
    for (uint32_t i = 0; i < block->cpuid_count && i < CPU_CPUID_MAX; i++) {
        const struct kvm_cpuid_entry2 *entry = &block->cpuid[i];
        if (entry->function != leaf)
            continue;
        if (entry->flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX && entry->index != subleaf)
            continue;
        answer[0] = entry->eax, answer[1] = entry->ebx, answer[2] = entry->ecx, answer[3] = entry->edx;
        return;
    }
}

/* MAXPHYADDR; 52 where the table does not say. Source: AMD APM vol. 3, Fn8000_0008 EAX. */
unsigned physical_bits(const struct cpu_block *block)
{
    uint32_t answer[4];
    cpuid_lookup(block, 0x80000008, 0, answer);
    unsigned bits = answer[0] & 0xff;
    return bits && bits <= 52 ? bits : 52;
}
