/* Where Unicorn has its CPU. The offsets are those of Unicorn 2.1.4 as the wheel's libunicorn.a has it; values that are
 * written by the public API, and what is read back, tell whether they are right for the one that we are linked with. */
#include <stddef.h>
#include <string.h>

#include "inside.h"

#if UC_VERSION_MAJOR != 2 || UC_VERSION_MINOR != 1 || UC_VERSION_PATCH != 4
#error "written against Unicorn 2.1.4: its internals are at other places in another version"
#endif

enum {
    HANDLE_CPU = 440, /* in uc_struct */
    HANDLE_NO_EXIT_REQUEST = 2034,
    HANDLE_FAULT_ADDRESS = 1416,
    HANDLE_TCG = 0x300,
    OBJECT_INTERRUPT_REQUEST = 28, /* in X86CPU */
    OBJECT_LEAVE_BLOCKS = 304,     /* a pointer to icount_decr */
    OBJECT_PASS_END = 33176,
    OBJECT_ENV = 35408,
    ENV_MSRS = 4800,
    ENV_TAIL = 5384,
};

static uint64_t word(const void *base, size_t offset)
{
    uint64_t value;
    memcpy(&value, (const char *)base + offset, sizeof(value));
    return value;
}

static void locate(void *uc, struct unicorn_state *at)
{
    at->object = (uint8_t *)word(uc, HANDLE_CPU);
    at->env = (struct env *)(at->object + OBJECT_ENV);
    at->msrs = (struct env_msrs *)((uint8_t *)at->env + ENV_MSRS);
    at->tail = (struct env_tail *)((uint8_t *)at->env + ENV_TAIL);
    at->pass_end = (struct pass_end *)(at->object + OBJECT_PASS_END);
    at->interrupt_request = (uint32_t *)(at->object + OBJECT_INTERRUPT_REQUEST);
    at->leave_blocks = (uint16_t *)(word(at->object, OBJECT_LEAVE_BLOCKS) + 2);
    at->no_exit_request = (uint8_t *)uc + HANDLE_NO_EXIT_REQUEST;
    at->fault_address = (uint64_t *)((uint8_t *)uc + HANDLE_FAULT_ADDRESS);
    at->tcg = (uint8_t *)word(uc, HANDLE_TCG);
}

struct mark {
    int reg;
    uint64_t value;
};

static const struct mark marks[] = {
    {UC_X86_REG_RAX, 0x5eed000000000001}, {UC_X86_REG_R15, 0x5eed00000000000f}, {UC_X86_REG_CR2, 0x5eed222200000000},
    {UC_X86_REG_DR1, 0x5eed111100000000}, {UC_X86_REG_RIP, 0x5eed333300000000},
};

enum { MSR_LSTAR = 0xc0000082 };

static bool marks_agree(uc_engine *uc, const struct unicorn_state *at)
{
    for (size_t i = 0; i < sizeof(marks) / sizeof(marks[0]); i++)
        if (uc_reg_write(uc, marks[i].reg, &marks[i].value))
            return false;
    uc_x86_msr lstar = {.rid = MSR_LSTAR, .value = 0x5eed444400000000};
    if (uc_reg_write(uc, UC_X86_REG_MSR, &lstar))
        return false;
    const struct env *env = at->env;
    return env->regs[RAX] == marks[0].value && env->regs[15] == marks[1].value && env->cr[2] == marks[2].value &&
           at->tail->dr[1] == marks[3].value && env->eip == marks[4].value && at->msrs->lstar == lstar.value;
}

/* Only what a wrong offset cannot make us touch memory for that is not there. */
static bool looks_like_a_cpu(void *uc)
{
    uint64_t object = word(uc, HANDLE_CPU);
    return object >= 0x10000 && object < 1ULL << 47 && !(object & 7);
}

bool unicorn_state_find(void *uc, struct unicorn_state *at, const char **why)
{
    *why = "this Unicorn has its CPU elsewhere than 2.1.4";
    if (!looks_like_a_cpu(uc))
        return false;
    locate(uc, at);
    ptrdiff_t before = (uint8_t *)at->env - (uint8_t *)at->leave_blocks;
    if (before <= 0 || before >= 1 << 12 || !marks_agree(uc, at))
        return false;
    uint64_t zero = 0;
    for (size_t i = 0; i < sizeof(marks) / sizeof(marks[0]); i++)
        uc_reg_write(uc, marks[i].reg, &zero);
    return true;
}
