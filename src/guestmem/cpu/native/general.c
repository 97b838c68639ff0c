/* Instructions on general registers that Unicorn takes for SSE, as they stand in the same opcode maps: with CR0.TS it raises
 * #NM, with CR0.EM or without CR4.OSFXSR some are #UD. They are stepped in a mode in which SSE would be allowed; translations
 * are told apart by it. Source: QEMU 5.0 target/i386/translate.c gen_sse(); Intel SDM vol. 2, "Exceptions" of each. */
#include "inside.h"

enum { HF_EM = 1 << 10, HF_TS = 1 << 11, SSE_MODE = HF_EM | HF_TS | HF_OSFXSR };

/* VEX.0F38 F2, F3, F5, F6, F7 and VEX.0F3A F0: ANDN, BLSx, BZHI, PDEP, PEXT, MULX, BEXTR, SARX, SHLX, SHRX, RORX. */
static bool is_bmi(const uint8_t *vex)
{
    unsigned map = vex[1] & 31;
    if (map == 2)
        return vex[3] == 0xf2 || vex[3] == 0xf3 || (vex[3] >= 0xf5 && vex[3] <= 0xf7);
    return map == 3 && vex[3] == 0xf0;
}

/* 0F38 F0, F1, F6: MOVBE, CRC32, ADCX, ADOX. In 32-bit code C4 is LES unless it cannot be. */
static bool is_general(const struct cpu *cpu, const uint8_t *opcode)
{
    if (opcode[0] == 0xc4)
        return (cpu->at.env->hflags & HF_CS64 || opcode[1] >= 0xc0) && is_bmi(opcode);
    return opcode[0] == 0x0f && opcode[1] == 0x38 && (opcode[2] == 0xf0 || opcode[2] == 0xf1 || opcode[2] == 0xf6);
}

bool is_refused_as_sse(struct cpu *cpu)
{
    struct instruction instruction;
    struct refused before = cpu->refused;
    if ((cpu->at.env->hflags & SSE_MODE) == HF_OSFXSR)
        return false;
    bool whole = decode(cpu, &instruction) && decode_more(cpu, &instruction, instruction.opcode + 4u);
    cpu->refused = before;
    return whole && is_general(cpu, &instruction.bytes[instruction.opcode]);
}

int step_as_general(struct cpu *cpu, int (*step)(struct cpu *cpu))
{
    struct env *env = cpu->at.env;
    uint32_t before = env->hflags & SSE_MODE;
    env->hflags = (env->hflags & ~(uint32_t)SSE_MODE) | HF_OSFXSR;
    int code = step(cpu);
    env->hflags = (env->hflags & ~(uint32_t)SSE_MODE) | before;
    return code;
}
