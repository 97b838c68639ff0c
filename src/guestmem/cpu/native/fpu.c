/* x87 and SSE state, between Unicorn's CPU and the XSAVE area of the block: FXSAVE's 512 bytes and a header.
 *
 * Unicorn keeps no last instruction, operand and opcode of the FPU: they stay in the area as they were given.
 *
 * Source: Intel SDM vol. 1, 10.5.1 "FXSAVE area" and 13.4 "XSAVE area"; QEMU fpu_helper.c do_xsave_fpu. */
#include <string.h>

#include "inside.h"

/* The fields of CPUX86State from `fpstt` on, which follows `efer`. */
struct fpu {
    uint32_t top;
    uint16_t status; /* without the top of the stack */
    uint16_t control;
    uint8_t empty[8]; /* by register, not by place on the stack */
    uint8_t padding[8];
    uint8_t registers[8][16];
};

enum { XMM_STRIDE = 64, SCAN = 2048 }; /* each xmm register has room for a zmm */
enum { AREA_FTW = 4, AREA_MXCSR = 24, AREA_MXCSR_MASK = 28, AREA_ST = 32, AREA_XMM = 160, AREA_XSTATE_BV = 512 };
enum { MXCSR_MASK = 0xffff, X87_AND_SSE = 3, FSW_TOP = 7 << 11 };

static uint32_t xmm_at, mxcsr_at; /* in CPUX86State; found once, the same in every CPU */

static struct fpu *fpu_of(struct cpu *cpu)
{
    return (struct fpu *)((uint8_t *)cpu->at.env + sizeof(struct env));
}

static uint32_t find(const uint8_t *env, const void *mark, size_t size, uint32_t from)
{
    for (uint32_t at = from; at < SCAN; at += 4)
        if (!memcmp(env + at, mark, size))
            return at;
    return 0;
}

/* By values that nothing else has; 0.5 us once the places are known. */
bool fpu_find(struct cpu *cpu)
{
    uint64_t xmm[2] = {0x5eed555500000000, 0x5eed555500000001}, mxcsr = 0x9fc0;
    uint8_t st[10] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10};
    const uint8_t *env = (const uint8_t *)cpu->at.env;
    if (uc_reg_write(cpu->uc, UC_X86_REG_XMM0, xmm) || uc_reg_write(cpu->uc, UC_X86_REG_MXCSR, &mxcsr) ||
        uc_reg_write(cpu->uc, UC_X86_REG_FP0, st))
        return false;
    bool found = !memcmp(fpu_of(cpu)->registers[0], st, sizeof(st));
    uint32_t xmm0 = find(env, xmm, sizeof(xmm), sizeof(struct env)), word = (uint32_t)mxcsr;
    uint32_t control = xmm0 ? find(env, &word, sizeof(word), xmm0 - 32) : 0;
    memset(xmm, 0, sizeof(xmm));
    memset(st, 0, sizeof(st));
    mxcsr = 0x1f80;
    uc_reg_write(cpu->uc, UC_X86_REG_XMM0, xmm);
    uc_reg_write(cpu->uc, UC_X86_REG_FP0, st);
    uc_reg_write(cpu->uc, UC_X86_REG_MXCSR, &mxcsr);
    if (!found || !control || control >= xmm0)
        return false;
    xmm_at = xmm0;
    mxcsr_at = control;
    return true;
}

void fpu_reset(struct cpu_block *block)
{
    uint16_t control = 0x37f;
    uint32_t mxcsr = 0x1f80, mask = MXCSR_MASK;
    memset(block->xsave, 0, sizeof(block->xsave));
    memcpy(block->xsave, &control, sizeof(control));
    memcpy(block->xsave + AREA_MXCSR, &mxcsr, sizeof(mxcsr));
    memcpy(block->xsave + AREA_MXCSR_MASK, &mask, sizeof(mask));
    block->xsave[AREA_XSTATE_BV] = X87_AND_SSE;
    block->xcr0 = 1;
}

void fpu_store(struct cpu *cpu)
{
    const struct fpu *fpu = fpu_of(cpu);
    uint8_t *area = cpu->block->xsave;
    uint16_t head[2] = {fpu->control, (uint16_t)((fpu->status & ~FSW_TOP) | (fpu->top & 7) << 11)};
    uint8_t used = 0;
    memcpy(area, head, sizeof(head));
    for (unsigned i = 0; i < 8; i++) {
        used |= (uint8_t)(!fpu->empty[i] << i);
        memcpy(area + AREA_ST + i * 16, fpu->registers[(i + fpu->top) & 7], 10);
    }
    area[AREA_FTW] = used;
    memcpy(area + AREA_MXCSR, (const uint8_t *)cpu->at.env + mxcsr_at, sizeof(uint32_t));
    for (unsigned i = 0; i < 16; i++)
        memcpy(area + AREA_XMM + i * 16, (const uint8_t *)cpu->at.env + xmm_at + i * XMM_STRIDE, 16);
    area[AREA_XSTATE_BV] = X87_AND_SSE;
    cpu->block->xcr0 = cpu->at.msrs->xcr0;
}

/* Control words go by the API, since rounding and the masks follow from them. */
void fpu_load(struct cpu *cpu)
{
    struct fpu *fpu = fpu_of(cpu);
    const uint8_t *area = cpu->block->xsave;
    uint64_t control = 0, mxcsr = 0;
    uint16_t status;
    memcpy(&control, area, sizeof(uint16_t));
    memcpy(&mxcsr, area + AREA_MXCSR, sizeof(uint32_t));
    memcpy(&status, area + 2, sizeof(status));
    uc_reg_write(cpu->uc, UC_X86_REG_FPCW, &control);
    uc_reg_write(cpu->uc, UC_X86_REG_MXCSR, &mxcsr);
    fpu->top = status >> 11 & 7;
    fpu->status = (uint16_t)(status & ~FSW_TOP);
    for (unsigned i = 0; i < 8; i++) {
        fpu->empty[i] = !(area[AREA_FTW] >> i & 1);
        memcpy(fpu->registers[(i + fpu->top) & 7], area + AREA_ST + i * 16, 10);
    }
    for (unsigned i = 0; i < 16; i++)
        memcpy((uint8_t *)cpu->at.env + xmm_at + i * XMM_STRIDE, area + AREA_XMM + i * 16, 16);
    cpu->at.msrs->xcr0 = cpu->block->xcr0;
}
