/* Model-specific registers: those that the CPU acts on, and those that only store. An index that is not known raises #GP in
 * the guest, and is refused to who steers. Those that lie in Unicorn's CPU while it runs are in the block when it does not.
 *
 * The TSC is CLOCK_MONOTONIC in nanoseconds and an offset: the same on all CPUs of a machine, and it goes on while a CPU does
 * not run.
 *
 * Source: arch/x86/kvm/x86.c kvm_get_msr_common, kvm_set_msr_common, set_efer, __kvm_set_msr; arch/x86/include/asm/
 * msr-index.h. */
#include <time.h>

#include "inside.h"

enum {
    MSR_TSC = 0x10, MSR_APIC_BASE = 0x1b, MSR_TSC_ADJUST = 0x3b, MSR_SYSENTER_CS = 0x174, MSR_SYSENTER_ESP = 0x175,
    MSR_SYSENTER_EIP = 0x176, MSR_PAT = 0x277,
};
enum {
    MSR_EFER = (int)0xc0000080, MSR_STAR = (int)0xc0000081, MSR_LSTAR = (int)0xc0000082, MSR_CSTAR = (int)0xc0000083,
    MSR_FMASK = (int)0xc0000084, MSR_FS_BASE = (int)0xc0000100, MSR_GS_BASE = (int)0xc0000101,
    MSR_KERNEL_GS_BASE = (int)0xc0000102, MSR_TSC_AUX = (int)0xc0000103, MSR_GHCB = (int)0xc0010130,
    MSR_SEV_STATUS = (int)0xc0010131,
};
enum { SNP_ENABLED = 7 }; /* SEV, SEV-ES, SEV-SNP */

struct known {
    uint32_t index;
    uint64_t value; /* after reset */
    bool constant;  /* KVM never changes it */
};

/* What only stores, and what never changes. */
static const struct known stored[] = {
    {MSR_SYSENTER_CS, 0, false}, {MSR_SYSENTER_ESP, 0, false}, {MSR_SYSENTER_EIP, 0, false},
    {(uint32_t)MSR_STAR, 0, false}, {(uint32_t)MSR_LSTAR, 0, false}, {(uint32_t)MSR_CSTAR, 0, false},
    {(uint32_t)MSR_FMASK, 0, false}, {(uint32_t)MSR_KERNEL_GS_BASE, 0, false}, {(uint32_t)MSR_TSC_AUX, 0, false},
    {MSR_TSC_ADJUST, 0, false},
    /* MTRR_CAP: 8 variable ones, fixed ones, write-combining. PLATFORM_ID, FSB_FREQ, PERF_STATUS: as KVM answers */
    {0xfe, 0x508, true}, {0x17, 0, true}, {0xcd, 3, true}, {0x198, (4ULL << 40) | 1000, true},
    /* EBL_CR_POWERON, SMI_COUNT, FEATURE_CONTROL, SPEC_CTRL, PRED_CMD, SMBASE, PLATFORM_INFO, UMWAIT, UCODE_REV */
    {0x2a, 0, false}, {0x34, 0, false}, {0x3a, 0, false}, {0x48, 0, false}, {0x49, 0, false}, {0x9e, 0, false},
    {0xce, 0, false}, {0xe1, 0, false}, {0x8b, 0x01000000ULL << 32, false},
    /* ARCH_CAPABILITIES, MISC_FEATURES_ENABLES, MCG_CAP, MCG_STATUS, MCG_CTL, DEBUGCTL, POWER_CTL, PERF_CAPABILITIES,
     * TSC_DEADLINE, XSS */
    {0x10a, 0, false}, {0x140, 0, false}, {0x179, 0, false}, {0x17a, 0, false}, {0x17b, 0, false}, {0x1d9, 0, false},
    {0x1fc, 0, false}, {0x345, 0, false}, {0x6e0, 0, false}, {0xda0, 0, false},
    {0x1a0, 1, false}, {MSR_PAT, 0x0007040600070406ULL, false},
    /* AMD: SYSCFG, HWCR, NB_CFG, PATCH_LOADER, INT_PENDING, VM_HSAVE_PA, DC_CFG, BU_CFG2, DE_CFG */
    {0xc0010010, 0, false}, {0xc0010015, 0, false}, {0xc001001f, 0, false}, {0xc0010020, 0, false}, {0xc0010055, 0, false},
    {0xc0010117, 0, false}, {0xc0011022, 0, false}, {0xc0011029, 0, false}, {0xc001102a, 0, false},
    /* MTRRs */
    {0x200, 0, false}, {0x201, 0, false}, {0x202, 0, false}, {0x203, 0, false}, {0x204, 0, false}, {0x205, 0, false},
    {0x206, 0, false}, {0x207, 0, false}, {0x208, 0, false}, {0x209, 0, false}, {0x20a, 0, false}, {0x20b, 0, false},
    {0x20c, 0, false}, {0x20d, 0, false}, {0x20e, 0, false}, {0x20f, 0, false}, {0x250, 0, false}, {0x258, 0, false},
    {0x259, 0, false}, {0x268, 0, false}, {0x269, 0, false}, {0x26a, 0, false}, {0x26b, 0, false}, {0x26c, 0, false},
    {0x26d, 0, false}, {0x26e, 0, false}, {0x26f, 0, false}, {0x2ff, 0, false},
    /* KVM's paravirtual registers: CPUID shows none of the features */
    {0x11, 0, false}, {0x12, 0, false}, {0x4b564d00, 0, false}, {0x4b564d01, 0, false}, {0x4b564d02, 0, false},
    {0x4b564d03, 0, false}, {0x4b564d04, 0, false}, {0x4b564d05, 1, false}, {0x4b564d06, 0, false}, {0x4b564d07, 0, false},
    {0x4b564d08, 0, false},
    /* of SNP guests; guest_kind says whether there are any */
    {(uint32_t)MSR_GHCB, 0, false}, {(uint32_t)MSR_SEV_STATUS, SNP_ENABLED, true},
};
enum { STORED = sizeof(stored) / sizeof(stored[0]) };
_Static_assert(sizeof(stored) / sizeof(stored[0]) <= CPU_MSRS_MAX + 0u, "msrs of the block");

void msrs_reset(struct cpu_block *block)
{
    for (unsigned i = 0; i < CPU_MSRS_MAX; i++)
        block->msrs[i] = i < STORED ? (struct cpu_msr){stored[i].index, 1, stored[i].value} : (struct cpu_msr){0};
}

/* ---- where they are */

uint64_t *msr_place(struct cpu_block *block, uint32_t index)
{
    for (unsigned i = 0; i < CPU_MSRS_MAX && block->msrs[i].present; i++)
        if (block->msrs[i].index == index)
            return &block->msrs[i].value;
    return NULL;
}

/* In Unicorn's CPU; NULL: not there. */
static uint64_t *live_place(struct cpu *cpu, uint32_t index)
{
    struct env_msrs *msrs = cpu->at.msrs;
    switch (index) {
    case MSR_SYSENTER_ESP: return &msrs->sysenter_esp;
    case MSR_SYSENTER_EIP: return &msrs->sysenter_eip;
    case (uint32_t)MSR_STAR: return &msrs->star;
    case (uint32_t)MSR_LSTAR: return &msrs->lstar;
    case (uint32_t)MSR_CSTAR: return &msrs->cstar;
    case (uint32_t)MSR_FMASK: return &msrs->fmask;
    case (uint32_t)MSR_KERNEL_GS_BASE: return &msrs->kernel_gs_base;
    case (uint32_t)MSR_TSC_AUX: return &msrs->tsc_aux;
    case (uint32_t)MSR_FS_BASE: return &cpu->at.env->segs[FS].base;
    case (uint32_t)MSR_GS_BASE: return &cpu->at.env->segs[GS].base;
    default: return NULL;
    }
}

static const uint32_t live[] = {MSR_SYSENTER_ESP, MSR_SYSENTER_EIP, (uint32_t)MSR_STAR, (uint32_t)MSR_LSTAR,
                                (uint32_t)MSR_CSTAR, (uint32_t)MSR_FMASK, (uint32_t)MSR_KERNEL_GS_BASE,
                                (uint32_t)MSR_TSC_AUX};

/* The first entries of the block are these and SYSENTER_CS, in the order of `stored`. */
void msrs_load(struct cpu *cpu)
{
    for (unsigned i = 0; i < sizeof(live) / sizeof(live[0]); i++)
        *live_place(cpu, live[i]) = cpu->block->msrs[i + 1].value;
    cpu->at.msrs->sysenter_cs = (uint32_t)cpu->block->msrs[0].value;
}

void msrs_store(struct cpu *cpu)
{
    for (unsigned i = 0; i < sizeof(live) / sizeof(live[0]); i++)
        cpu->block->msrs[i + 1].value = *live_place(cpu, live[i]);
    cpu->block->msrs[0].value = cpu->at.msrs->sysenter_cs;
}

/* ---- what an access depends on: of the CPU that runs, or of the block of one that does not */

struct view {
    struct cpu *cpu; /* NULL: it does not run, and who steers asks */
    struct cpu_block *block;
    uint64_t cr0, cr4;
    uint64_t *efer;
};

static struct view view_of(struct cpu_block *block, struct cpu *cpu)
{
    struct view view = {cpu, block, 0, 0, NULL};
    view.cr0 = cpu ? cpu->at.env->cr[0] : block->sregs.cr0;
    view.cr4 = cpu ? cpu->at.env->cr[4] : block->sregs.cr4;
    view.efer = cpu ? &cpu->at.env->efer : (uint64_t *)&block->sregs.efer;
    return view;
}

static uint64_t *place_of(const struct view *view, uint32_t index)
{
    bool snp = view->block->guest_kind == CPU_GUEST_SNP;
    if (!snp && (index == (uint32_t)MSR_GHCB || index == (uint32_t)MSR_SEV_STATUS))
        return NULL;
    uint64_t *place = view->cpu ? live_place(view->cpu, index) : NULL;
    if (!view->cpu && index == (uint32_t)MSR_FS_BASE)
        place = (uint64_t *)&view->block->sregs.fs.base;
    if (!view->cpu && index == (uint32_t)MSR_GS_BASE)
        place = (uint64_t *)&view->block->sregs.gs.base;
    if (index == (uint32_t)MSR_EFER)
        place = view->efer;
    if (index == MSR_APIC_BASE)
        place = (uint64_t *)&view->block->sregs.apic_base;
    return place ? place : msr_place(view->block, index);
}

static bool is_constant(uint32_t index)
{
    for (unsigned i = 0; i < STORED; i++)
        if (stored[i].index == index)
            return stored[i].constant;
    return false;
}

/* ---- reading */

uint64_t cpu_tsc(const struct cpu_block *block)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec + (uint64_t)block->tsc_offset;
}

static bool get(const struct view *view, uint32_t index, uint64_t *value)
{
    if (index == MSR_TSC) {
        *value = cpu_tsc(view->block);
        return true;
    }
    if (index == MSR_SYSENTER_CS && view->cpu) {
        *value = view->cpu->at.msrs->sysenter_cs;
        return true;
    }
    const uint64_t *place = place_of(view, index);
    if (place)
        *value = *place;
    return place;
}

/* ---- writing */

static bool must_be_canonical(uint32_t index)
{
    return index == MSR_SYSENTER_ESP || index == MSR_SYSENTER_EIP || index == (uint32_t)MSR_LSTAR ||
           index == (uint32_t)MSR_CSTAR || index == (uint32_t)MSR_FS_BASE || index == (uint32_t)MSR_GS_BASE ||
           index == (uint32_t)MSR_KERNEL_GS_BASE;
}

static bool is_canonical(const struct view *view, uint64_t value)
{
    unsigned unused = view->cr4 & CR4_LA57 ? 7 : 16;
    return (uint64_t)((int64_t)(value << unused) >> unused) == value;
}

/* Of memory types of PAT there are 0, 1 and 4 to 7. */
static bool is_pat(uint64_t value)
{
    for (int i = 0; i < 8; i++, value >>= 8)
        if ((value & 0xff) > 7 || (value & 0xff) == 2 || (value & 0xff) == 3)
            return false;
    return true;
}

enum { CPUID_NX = 1 << 20, CPUID_LM = 1 << 29 };

static uint64_t efer_allowed(const struct view *view)
{
    uint64_t allowed = EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE;
    uint32_t features[4];
    if (!view->cpu || !view->block->cpuid_count)
        return allowed;
    cpuid_lookup(view->block, 0x80000001, 0, features);
    if (!(features[3] & CPUID_NX))
        allowed &= ~EFER_NXE;
    if (!(features[3] & CPUID_LM))
        allowed &= ~(EFER_LME | EFER_LMA);
    return allowed;
}

static bool set_efer(const struct view *view, uint64_t value)
{
    uint64_t *efer = view->efer;
    if (value & ~efer_allowed(view) || (view->cr0 & CR0_PG && (*efer ^ value) & EFER_LME))
        return false;
    *efer = (value & ~EFER_LMA) | (*efer & EFER_LMA);
    if (!view->cpu)
        return true;
    update_hflags(view->cpu);
    tlb_flush(view->cpu);
    return true;
}

/* The host's write is the offset alone; the guest's is an adjustment that it can read. */
static void set_tsc(const struct view *view, uint64_t value)
{
    uint64_t change = value - cpu_tsc(view->block);
    view->block->tsc_offset += (int64_t)change;
    if (view->cpu)
        *msr_place(view->block, MSR_TSC_ADJUST) += change;
}

static void set_tsc_adjust(const struct view *view, uint64_t value)
{
    uint64_t *adjust = msr_place(view->block, MSR_TSC_ADJUST);
    if (view->cpu)
        view->block->tsc_offset += (int64_t)(value - *adjust);
    *adjust = value;
}

static bool set_stored(const struct view *view, uint32_t index, uint64_t value)
{
    if (index == MSR_SYSENTER_CS && view->cpu) {
        view->cpu->at.msrs->sysenter_cs = (uint32_t)value;
        return true;
    }
    uint64_t *place = place_of(view, index);
    if (!place || (is_constant(index) && (view->cpu || *place != value))) /* as it is it may be written back */
        return false;
    if (index == MSR_PAT && !is_pat(value))
        return false;
    *place = value;
    return true;
}

static bool set(const struct view *view, uint32_t index, uint64_t value)
{
    if (must_be_canonical(index) && !is_canonical(view, value))
        return false;
    if (index == (uint32_t)MSR_EFER)
        return set_efer(view, value);
    if (index == MSR_TSC)
        set_tsc(view, value);
    else if (index == MSR_TSC_ADJUST)
        set_tsc_adjust(view, value);
    else
        return set_stored(view, index, value);
    return true;
}

/* ---- for who steers */

bool cpu_msr_get(struct cpu_block *block, uint32_t index, uint64_t *value)
{
    struct view view = view_of(block, NULL);
    return get(&view, index, value);
}

bool cpu_msr_set(struct cpu_block *block, uint32_t index, uint64_t value)
{
    struct view view = view_of(block, NULL);
    if (!set(&view, index, value))
        return false;
    block->dirty |= CPU_MSRS | CPU_SREGS;
    return true;
}

/* ---- RDMSR and WRMSR */

enum { TWO_BYTES = 0x0f, RDMSR = 0x32, LENGTH_MAX = 15 };

static void move_past(struct cpu *cpu)
{
    cpu->at.env->eip += cpu->call_length;
    instruction_done(cpu);
}

static bool must_stop(const struct cpu_block *block, uint32_t index, bool write)
{
    for (uint32_t i = 0; i < block->stop_msrs_count && i < CPU_STOP_MSRS_MAX; i++) {
        const struct cpu_msr_range *range = &block->stop_msrs[i];
        if (index - range->first < range->count && (write ? range->writes : range->reads))
            return true;
    }
    return false;
}

static int stop_for(struct cpu *cpu, uint32_t index, bool write, uint64_t value)
{
    struct cpu_stop *stop = stop_begin(cpu, write ? CPU_STOP_WRMSR : CPU_STOP_RDMSR);
    stop->nr = index;
    stop->value[0] = value;
    return (int)stop->kind;
}

static void give(struct cpu *cpu, uint64_t value)
{
    cpu->at.env->regs[RAX] = (uint32_t)value;
    cpu->at.env->regs[RDX] = value >> 32;
}

int msr_instruction(struct cpu *cpu)
{
    struct view view = view_of(cpu->block, cpu);
    struct env *env = cpu->at.env;
    uint8_t code[LENGTH_MAX + 1] = {0};
    uint8_t length = 0;
    do {
        if (length == LENGTH_MAX || !linear_code(cpu, linear_rip(cpu) + length, &code[length], 1))
            return stop_not_done(cpu, &cpu->refused);
        length++;
    } while (length < 2 || code[length - 2] != TWO_BYTES);
    bool write = code[length - 1] != RDMSR;
    uint32_t index = (uint32_t)env->regs[RCX];
    uint64_t value = (uint32_t)env->regs[RAX] | env->regs[RDX] << 32;
    cpu->call_length = length;
    if (must_stop(cpu->block, index, write))
        return stop_for(cpu, index, write, value);
    if (!(write ? set(&view, index, value) : get(&view, index, &value))) {
        if (cpu->block->msr_mode & CPU_MSR_STOP_UNKNOWN)
            return stop_for(cpu, index, write, value);
        pend(cpu, GP, 0);
        return CPU_STOP_NONE;
    }
    if (!write)
        give(cpu, value);
    move_past(cpu);
    trap_if_traced(cpu);
    return CPU_STOP_NONE;
}

void msr_finish(struct cpu *cpu, uint64_t value)
{
    if (cpu->block->stop.kind == CPU_STOP_RDMSR)
        give(cpu, value);
    move_past(cpu);
}
