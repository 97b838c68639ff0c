/* Model-specific registers, as KVM has them: those that the CPU acts on, and those that only store.
 *
 * While the CPU does not run the block holds all: sregs, xcr0, tsc_offset, and the table msrs, whose first entries are the
 * CPU's own (state.c). What KVM's paravirtual registers ask the host to write to guest memory is not written; CPUID shows
 * none of these features. The TSC counts nanoseconds of CLOCK_MONOTONIC.
 *
 * Source: arch/x86/kvm/x86.c kvm_get_msr_common, kvm_set_msr_common, set_efer, __kvm_set_msr; arch/x86/include/asm/
 * msr-index.h. */
#include "internal.h"

#include <string.h>
#include <time.h>

enum { TSC = 0x10, APIC_BASE = 0x1b, TSC_ADJUST = 0x3b, PAT = 0x277 };
#define EFER 0xc0000080u
#define FS_BASE 0xc0000100u
#define GS_BASE 0xc0000101u
#define GHCB 0xc0010130u
#define SEV_STATUS 0xc0010131u
enum { SNP_ENABLED = 7 }; /* SEV, SEV-ES, SEV-SNP */

struct run {
    uint32_t first, count;
    uint64_t value;
};

/* The CPU's own come first. */
static const struct run stored[] = {
    {0x174, 3, 0},         /* SYSENTER_CS, _ESP, _EIP */
    {0xc0000081, 4, 0},    /* STAR, LSTAR, CSTAR, FMASK */
    {0xc0000102, 2, 0},    /* KERNEL_GS_BASE, TSC_AUX */
    {TSC_ADJUST, 1, 0},
    {0x11, 2, 0},          /* KVM: WALL_CLOCK, SYSTEM_TIME */
    {0x2a, 1, 0},          /* EBL_CR_POWERON */
    {0x34, 1, 0},          /* SMI_COUNT */
    {0x3a, 1, 0},          /* FEATURE_CONTROL */
    {0x48, 2, 0},          /* SPEC_CTRL, PRED_CMD */
    {0x8b, 1, 0x0100000000000000}, /* UCODE_REV */
    {0x9e, 1, 0},          /* SMBASE */
    {0xce, 1, 0},          /* PLATFORM_INFO */
    {0xe1, 1, 0},          /* UMWAIT_CONTROL */
    {0x10a, 1, 0},         /* ARCH_CAPABILITIES */
    {0x140, 1, 0},         /* MISC_FEATURES_ENABLES */
    {0x179, 3, 0},         /* MCG_CAP, MCG_STATUS, MCG_CTL */
    {0x1a0, 1, 1},         /* MISC_ENABLE */
    {0x1d9, 1, 0},         /* DEBUGCTL */
    {0x1fc, 1, 0},         /* POWER_CTL */
    {0x200, 16, 0},        /* variable MTRRs */
    {0x250, 1, 0},         /* fixed MTRRs */
    {0x258, 2, 0},
    {0x268, 8, 0},
    {PAT, 1, 0x0007040600070406},
    {0x2ff, 1, 0},         /* MTRR_DEF_TYPE */
    {0x345, 1, 0},         /* PERF_CAPABILITIES */
    {0x6e0, 1, 0},         /* TSC_DEADLINE */
    {0xda0, 1, 0},         /* XSS */
    {0x4b564d00, 5, 0},    /* KVM's */
    {0x4b564d05, 1, 1},
    {0x4b564d06, 3, 0},
    {0xc0010010, 1, 0},    /* SYSCFG */
    {0xc0010015, 1, 0},    /* HWCR */
    {0xc001001f, 2, 0},    /* NB_CFG, PATCH_LOADER */
    {0xc0010055, 1, 0},    /* INT_PENDING */
    {0xc0010117, 1, 0},    /* VM_HSAVE_PA */
    {0xc0011022, 1, 0},    /* DC_CFG */
    {0xc0011029, 2, 0},    /* DE_CFG, BU_CFG2 */
    {GHCB, 1, 0},
};

/* MTRRs: 8 variable ones, fixed ones, write-combining. PLATFORM_ID, FSB_FREQ, PERF_STATUS: as KVM answers. */
static const struct run constant[] = {{0xfe, 1, 0x508}, {0x17, 1, 0}, {0xcd, 1, 3}, {0x198, 1, 4ull << 40 | 1000}};

#define COUNT(array) (sizeof(array) / sizeof *(array))

void msrs_reset(struct cpu_block *block)
{
    unsigned n = 0;
    memset(block->msrs, 0, sizeof block->msrs);
    for (unsigned i = 0; i < COUNT(stored); i++)
        for (uint32_t k = 0; k < stored[i].count; k++, n++)
            block->msrs[n] = (struct cpu_msr){stored[i].first + k, 1, stored[i].value};
}

uint64_t *msr_slot(struct cpu_block *block, uint32_t index)
{
    for (unsigned n = 0, i = 0; i < COUNT(stored); n += stored[i++].count)
        if (index - stored[i].first < stored[i].count)
            return &block->msrs[n + index - stored[i].first].value;
    return NULL;
}

static bool is_constant(const struct cpu_block *block, uint32_t index, uint64_t *value)
{
    for (unsigned i = 0; i < COUNT(constant); i++)
        if (constant[i].first == index) {
            *value = constant[i].value;
            return true;
        }
    *value = SNP_ENABLED;
    return index == SEV_STATUS && block->guest_kind == CPU_GUEST_SNP;
}

uint64_t tsc_now(const struct cpu_block *block)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec + (uint64_t)block->tsc_offset;
}

bool msr_read(const struct cpu_block *block, uint32_t index, uint64_t *value)
{
    switch (index) {
    case TSC:
        *value = tsc_now(block);
        return true;
    case APIC_BASE:
        *value = block->sregs.apic_base;
        return true;
    case EFER:
        *value = block->sregs.efer;
        return true;
    case FS_BASE:
        *value = block->sregs.fs.base;
        return true;
    case GS_BASE:
        *value = block->sregs.gs.base;
        return true;
    case GHCB:
        if (block->guest_kind != CPU_GUEST_SNP)
            return false;
    }
    const uint64_t *slot = msr_slot((struct cpu_block *)block, index);
    if (slot)
        *value = *slot;
    return slot || is_constant(block, index, value);
}

static bool must_be_canonical(uint32_t index)
{
    return index == 0x175 || index == 0x176 || index == 0xc0000082 || index == 0xc0000083 ||
           (index >= FS_BASE && index <= 0xc0000102);
}

static bool canonical(const struct cpu_block *block, uint64_t value)
{
    int64_t sign = (int64_t)value >> (block->sregs.cr4 & CR4_LA57 ? 56 : 47);
    return !sign || sign == -1;
}

/* Each of its eight fields is a memory type. */
static bool valid_pat(uint64_t value)
{
    for (int shift = 0; shift < 64; shift += 8) {
        unsigned type = value >> shift & 0xff;
        if (type > 7 || type == 2 || type == 3)
            return false;
    }
    return true;
}

static bool write_efer(struct cpu_block *block, uint64_t value, bool guest)
{
    uint64_t allowed = EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE;
    uint32_t features[4];
    cpuid_lookup(block, 0x80000001, 0, features);
    if (guest && !(features[3] & 1u << 20))
        allowed &= ~(uint64_t)EFER_NXE;
    if (guest && !(features[3] & 1u << 29))
        allowed &= ~(uint64_t)(EFER_LME | EFER_LMA);
    uint64_t old = block->sregs.efer;
    if (value & ~allowed || (block->sregs.cr0 & CR0_PG && (old ^ value) & EFER_LME))
        return false;
    block->sregs.efer = (value & ~(uint64_t)EFER_LMA) | (old & EFER_LMA);
    block->dirty |= CPU_SREGS;
    return true;
}

static void write_tsc(struct cpu_block *block, uint64_t value, bool guest)
{
    uint64_t change = value - tsc_now(block);
    block->tsc_offset += (int64_t)change;
    if (guest)
        *msr_slot(block, TSC_ADJUST) += change;
}

/* Whether it took the value. `guest`: the guest wants it, which is allowed less. */
bool msr_write(struct cpu_block *block, uint32_t index, uint64_t value, bool guest)
{
    uint64_t *slot = msr_slot(block, index), old;
    if (must_be_canonical(index) && !canonical(block, value))
        return false;
    switch (index) {
    case TSC:
        write_tsc(block, value, guest);
        return true;
    case TSC_ADJUST:
        block->tsc_offset += guest ? (int64_t)(value - *slot) : 0;
        break;
    case APIC_BASE:
        block->sregs.apic_base = value;
        block->dirty |= CPU_SREGS;
        return true;
    case EFER:
        return write_efer(block, value, guest);
    case FS_BASE:
        block->sregs.fs.base = value;
        block->dirty |= CPU_SREGS;
        return true;
    case GS_BASE:
        block->sregs.gs.base = value;
        block->dirty |= CPU_SREGS;
        return true;
    case PAT:
        if (!valid_pat(value))
            return false;
        break;
    case GHCB:
        if (block->guest_kind != CPU_GUEST_SNP)
            return false;
    }
    if (!slot) /* what KVM never changes may be written back as it is */
        return !guest && is_constant(block, index, &old) && old == value;
    *slot = value;
    block->dirty |= CPU_MSRS;
    return true;
}

bool cpu_msr_get(struct cpu_block *block, uint32_t index, uint64_t *value)
{
    return msr_read(block, index, value);
}

bool cpu_msr_set(struct cpu_block *block, uint32_t index, uint64_t value)
{
    return msr_write(block, index, value, false);
}
