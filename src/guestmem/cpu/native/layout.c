/* Whether Unicorn lies in memory as layout.h says. Another build of it must end in an error, never in a wrong guest. */
#define _GNU_SOURCE
#include "internal.h"

#include <malloc.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* Of translated code. Unicorn's default is 1 GiB, which neither RLIMIT_AS nor mlockall(MCL_FUTURE) survives with 16
 * CPUs; Debian's kernel up to a shell translates to about 40 MiB. When it is full everything is translated again. */
enum { CODE_BUFFER = 32 << 20 };
enum { KNOWN_VERSION = 2 << 16 | 1 << 8 | 4 };

/* A new x86 CPU whose TLB asks a hook, and which no address stops. */
uc_engine *layout_open(void)
{
    uc_engine *uc;
    if (uc_open(UC_ARCH_X86, UC_MODE_64, &uc))
        return NULL;
    /* The richest model that Unicorn lets one choose; CPUID is answered by us, this decides what executes. */
    if (uc_ctl_set_cpu_model(uc, UC_CPU_X86_EPYC) || uc_ctl_set_tcg_buffer_size(uc, CODE_BUFFER) ||
        uc_ctl_tlb_mode(uc, UC_TLB_VIRTUAL) || uc_ctl_exits_enable(uc)) {
        uc_close(uc);
        return NULL;
    }
    return uc;
}

void layout_view(uc_engine *uc, struct uc_view *view)
{
    uint8_t *handle = (uint8_t *)uc;
    view->cpu_state = *(uint8_t **)(handle + UC_CPU);
    view->tcg = *(uint8_t **)(handle + UC_TCG);
    view->env = (struct uc_env *)(view->cpu_state + CPU_ENV);
    view->msrs = (struct uc_msrs *)((uint8_t *)view->env + ENV_MSRS);
    view->tail = (struct uc_tail *)((uint8_t *)view->env + ENV_TAIL);
    view->pass_end = (struct uc_pass_end *)(view->cpu_state + CPU_PASS_END);
    view->interrupt_request = (uint32_t *)(view->cpu_state + CPU_INTERRUPT_REQUEST);
    view->leave_blocks = *(uint16_t **)(view->cpu_state + CPU_ICOUNT_DECR_PTR) + 1;
    view->no_exit_request = handle + UC_NO_EXIT_REQUEST;
    view->fault_address = (uint64_t *)(handle + UC_INVALID_ADDR);
}

static bool wrong(const char *what)
{
    set_error("this is not Unicorn 2.1.4 as it is known: %s", what);
    return false;
}

/* A pointer of a build that is laid out otherwise may lead anywhere; the kernel tells whether it can be read. */
static bool readable(const void *address, size_t size)
{
    unsigned char resident;
    uintptr_t first = (uintptr_t)address & PAGE_MASK, last = ((uintptr_t)address + size - 1) & PAGE_MASK;
    if ((uintptr_t)address < PAGE || (uintptr_t)address >> 47)
        return false;
    for (; first <= last; first += PAGE)
        if (mincore((void *)first, PAGE, &resident))
            return false;
    return true;
}

static bool pointers_lead_somewhere(uc_engine *uc)
{
    uint8_t *handle = (uint8_t *)uc;
    if (malloc_usable_size(uc) < UC_NO_EXIT_REQUEST + 1)
        return false;
    uint8_t *cpu_state = *(uint8_t **)(handle + UC_CPU), *tcg = *(uint8_t **)(handle + UC_TCG);
    if (!readable(cpu_state, CPU_ENV + ENV_SIZE) || !readable(tcg, TCG_CODE_BUFFER_SIZE + 8))
        return false;
    uint16_t *decrementer = *(uint16_t **)(cpu_state + CPU_ICOUNT_DECR_PTR);
    return (uint8_t *)decrementer > cpu_state && (uint8_t *)decrementer < cpu_state + CPU_ENV;
}

static const int general[16] = {
    UC_X86_REG_RAX, UC_X86_REG_RCX, UC_X86_REG_RDX, UC_X86_REG_RBX, UC_X86_REG_RSP, UC_X86_REG_RBP,
    UC_X86_REG_RSI, UC_X86_REG_RDI, UC_X86_REG_R8,  UC_X86_REG_R9,  UC_X86_REG_R10, UC_X86_REG_R11,
    UC_X86_REG_R12, UC_X86_REG_R13, UC_X86_REG_R14, UC_X86_REG_R15,
};

static uint64_t mark(unsigned group, unsigned number)
{
    return 0x5eed000000000000ull + group * 0x0000111100000000ull + number * 0x01010101u;
}

static void write_marks(uc_engine *uc)
{
    uint64_t value;
    for (int i = 0; i < 16; i++)
        value = mark(0, i), uc_reg_write(uc, general[i], &value);
    for (int i = 0; i < 4; i++)
        value = mark(1, i), uc_reg_write(uc, UC_X86_REG_DR0 + i, &value);
    value = mark(2, 0), uc_reg_write(uc, UC_X86_REG_CR2, &value);
    value = mark(3, 0), uc_reg_write(uc, UC_X86_REG_RIP, &value);
    for (int i = 0; i < 3; i++) {
        uc_x86_msr msr = {0xc0000082 + i, mark(4, i)};
        uc_reg_write(uc, UC_X86_REG_MSR, &msr);
    }
    for (int i = 0; i < 16; i++) {
        uint64_t pair[2] = {mark(5, i), mark(6, i)};
        uc_reg_write(uc, UC_X86_REG_XMM0 + i, pair);
    }
    for (int i = 0; i < 8; i++) {
        uint64_t pair[2] = {mark(7, i), 0x1234};
        uc_reg_write(uc, UC_X86_REG_FP0 + i, pair);
    }
    value = 0x27f, uc_reg_write(uc, UC_X86_REG_FPCW, &value);
    value = 0x1f85, uc_reg_write(uc, UC_X86_REG_MXCSR, &value);
}

static bool marks_are_there(const struct uc_view *view)
{
    const struct uc_env *env = view->env;
    bool found = env->cr[2] == mark(2, 0) && env->eip == mark(3, 0) && env->fpuc == 0x27f && env->mxcsr == 0x1f85;
    for (int i = 0; i < 16; i++)
        found &= env->regs[i] == mark(0, i) && !memcmp(env->xmm_regs[i].low, (uint64_t[]){mark(5, i), mark(6, i)}, 16);
    for (int i = 0; i < 8; i++)
        found &= env->fpregs[i].significand == mark(7, i) && env->fpregs[i].exponent == 0x1234;
    for (int i = 0; i < 4; i++)
        found &= view->tail->dr[i] == mark(1, i);
    return found && view->msrs->lstar == mark(4, 0) && view->msrs->cstar == mark(4, 1) &&
           view->msrs->fmask == mark(4, 2) && view->msrs->xcr0 == 3;
}

static bool fill_own_page(uc_engine *uc, uint64_t linear, uc_mem_type kind, uc_tlb_entry *entry, void *data)
{
    (void)uc, (void)linear, (void)kind;
    entry->paddr = (uintptr_t)data;
    entry->perms = UC_PROT_ALL;
    return true;
}

static bool refuse_fill(uc_engine *uc, uint64_t linear, uc_mem_type kind, uc_tlb_entry *entry, void *data)
{
    (void)uc, (void)linear, (void)kind, (void)entry, (void)data;
    return false;
}

static void stop_at_store(uc_engine *uc, uc_mem_type type, uint64_t address, int size, int64_t value, void *data)
{
    (void)type, (void)address, (void)size, (void)value, (void)data;
    uc_emu_stop(uc);
}

static bool faults_are_told(uc_engine *uc, const struct uc_view *view)
{
    uc_hook hook;
    const uint64_t address = 0x123456789abc;
    uc_hook_add(uc, &hook, UC_HOOK_TLB_FILL, (void *)refuse_fill, NULL, 1, 0);
    uc_emu_start(uc, address, 0, 0, 0);
    bool told = *view->fault_address == address;
    uc_hook_del(uc, hook);
    return told;
}

/* Executes HLT, INT 5, and a store that asks for a stop with an instruction after it that would show. */
static const char *misbehaviour(uc_engine *uc, const struct uc_view *view, uint8_t *page)
{
    static const uint8_t code[] = {0xf4, 0xcd, 0x05, 0x88, 0x07, 0xff, 0xc0, 0xeb, 0xfa};
    uc_hook fill, store;
    uint64_t at = (uintptr_t)page;
    memcpy(page, code, sizeof code);
    uc_hook_add(uc, &fill, UC_HOOK_TLB_FILL, (void *)fill_own_page, page, 1, 0);
    uc_hook_add(uc, &store, UC_HOOK_MEM_WRITE, (void *)stop_at_store, NULL, 1, 0);
    if (uc_mem_map_ptr(uc, at, PAGE, UC_PROT_ALL, page))
        return "uc_mem_map_ptr";
    if (uc_emu_start(uc, at, 0, 0, 0) != UC_ERR_OK || view->pass_end->halted != 1)
        return "CPUState.halted";
    if (uc_emu_start(uc, at + 1, 0, 0, 0) != UC_ERR_EXCEPTION || view->pass_end->exception_index != 5)
        return "CPUState.exception_index";
    *view->no_exit_request = 1;
    view->env->regs[RAX] = 0, view->env->regs[RDI] = at + 2048;
    uc_emu_start(uc, at + 3, 0, 0, 0);
    if (view->env->regs[RAX] != 1 || view->env->eip != at + 3)
        return "uc_struct.no_exit_request";
    if (*view->interrupt_request || *view->leave_blocks)
        return "CPUState.interrupt_request";
    uint64_t size = *(uint64_t *)(view->tcg + TCG_CODE_BUFFER_SIZE);
    if (size > CODE_BUFFER || size < CODE_BUFFER / 2)
        return "TCGContext.code_gen_buffer_size";
    return layout_disas_flags ? NULL : "DisasContext.flags";
}

static bool check(uc_engine *uc, uint8_t *page)
{
    struct uc_view view;
    write_marks(uc);
    if (!pointers_lead_somewhere(uc))
        return wrong("uc_struct");
    layout_view(uc, &view);
    if (!marks_are_there(&view))
        return wrong("CPUX86State");
    if (!faults_are_told(uc, &view))
        return wrong("uc_struct.invalid_addr");
    const char *what = misbehaviour(uc, &view, page);
    return what ? wrong(what) : true;
}

bool layout_check(void)
{
    static pthread_mutex_t once = PTHREAD_MUTEX_INITIALIZER;
    static bool checked, fits;
    unsigned major, minor;
    pthread_mutex_lock(&once);
    if (!checked) {
        uc_engine *uc = layout_open();
        uint8_t *page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        checked = uc && page != MAP_FAILED;
        if (!checked)
            set_error("no memory for a CPU");
        else
            fits = uc_version(&major, &minor) >> 8 == KNOWN_VERSION ? check(uc, page) : wrong("its version");
        if (uc)
            uc_close(uc);
        if (page != MAP_FAILED)
            munmap(page, PAGE);
    } else if (!fits)
        wrong("see the first error");
    pthread_mutex_unlock(&once);
    return checked && fits;
}
