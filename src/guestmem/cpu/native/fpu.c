/* FPU and SSE state as an XSAVE area in standard form: FXSAVE's 512 bytes, and a header.
 *
 * Unicorn keeps no last instruction, operand and opcode of the FPU (FIP, FDP, FOP): they are stored and given back. What
 * the area says beyond x87 and SSE is for who steers to refuse. Source: Intel SDM vol. 1, 10.5.1 and 13.4. */
#include "internal.h"

#include <string.h>

enum { XSTATE_X87 = 1, XSTATE_SSE = 2, LEGACY = 512, MXCSR_MASK = 0xffff };

struct fxsave {
    uint16_t control, status;
    uint8_t used, reserved;
    uint16_t opcode;
    uint64_t instruction, operand;
    uint32_t mxcsr, mxcsr_mask;
    uint8_t st[8][16];
    uint8_t xmm[16][16];
};

static void set_words(struct cpu *cpu, uint64_t control, uint32_t mxcsr)
{
    /* Through Unicorn, because they set its rounding modes too. */
    uc_reg_write(cpu->uc, UC_X86_REG_FPCW, &control);
    uc_reg_write(cpu->uc, UC_X86_REG_MXCSR, &mxcsr);
}

static void load_x87(struct uc_env *env, const struct fxsave *image)
{
    env->fpstt = image->status >> 11 & 7;
    env->fpus = image->status & ~0x3800;
    env->fpop = image->opcode;
    env->fpip = image->instruction;
    env->fpdp = image->operand;
    for (unsigned i = 0; i < 8; i++) {
        env->fptags[i] = !(image->used >> i & 1);
        memcpy(&env->fpregs[(i + env->fpstt) & 7], image->st[i], 10);
    }
}

static const struct fxsave initial = {.control = 0x37f, .mxcsr = 0x1f80};

void load_fpu(struct cpu *cpu)
{
    struct uc_env *env = cpu->env;
    const struct fxsave *image = (const struct fxsave *)cpu->block->xsave;
    uint64_t present;
    memcpy(&present, cpu->block->xsave + LEGACY, sizeof present);
    const struct fxsave *x87 = present & XSTATE_X87 ? image : &initial;
    load_x87(env, x87);
    for (unsigned i = 0; i < 16; i++)
        if (present & XSTATE_SSE)
            memcpy(env->xmm_regs[i].low, image->xmm[i], 16);
        else
            memset(env->xmm_regs[i].low, 0, 16);
    set_words(cpu, x87->control, image->mxcsr & MXCSR_MASK);
    cpu->msrs->xcr0 = cpu->block->xcr0;
}

void store_fpu(struct cpu *cpu)
{
    const struct uc_env *env = cpu->env;
    struct fxsave *image = (struct fxsave *)cpu->block->xsave;
    const uint64_t present = XSTATE_X87 | XSTATE_SSE;
    image->control = env->fpuc;
    image->status = (uint16_t)((env->fpus & ~0x3800u) | (env->fpstt & 7) << 11);
    image->used = 0;
    image->opcode = env->fpop;
    image->instruction = env->fpip;
    image->operand = env->fpdp;
    image->mxcsr = env->mxcsr;
    image->mxcsr_mask = MXCSR_MASK;
    for (unsigned i = 0; i < 8; i++) {
        image->used |= (uint8_t)(!env->fptags[i] << i);
        memcpy(image->st[i], &env->fpregs[(i + env->fpstt) & 7], 10);
    }
    for (unsigned i = 0; i < 16; i++)
        memcpy(image->xmm[i], env->xmm_regs[i].low, 16);
    memcpy(cpu->block->xsave + LEGACY, &present, sizeof present);
    cpu->block->xcr0 = cpu->msrs->xcr0;
}
