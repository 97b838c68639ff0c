/* The bytes of the instruction at RIP, as far as who asks needs them: Unicorn may have found it invalid, or taken it for
 * another, before it had all of it, so nothing is fetched for nothing. */
#include <string.h>

#include "inside.h"

enum { OPERAND_SIZE = 0x66, ADDRESS_SIZE = 0x67, REPNE = 0xf2, REP = 0xf3 };

bool decode_more(struct cpu *cpu, struct instruction *instruction, unsigned count)
{
    while (instruction->got < count) {
        if (instruction->got == INSTRUCTION_MAX ||
            !linear_code(cpu, linear_rip(cpu) + instruction->got, &instruction->bytes[instruction->got], 1))
            return false; /* Unicorn found it invalid before it had all of it */
        instruction->got++;
    }
    return true;
}

static bool take_prefix(struct instruction *instruction, uint8_t byte, bool long_mode)
{
    switch (byte) {
    case REPNE: case REP:
        instruction->repeat = byte;
        return true;
    case OPERAND_SIZE:
        instruction->operand_size = true;
        return true;
    case ADDRESS_SIZE:
        instruction->address_size = true;
        return true;
    case 0x26: case 0x2e: case 0x36: case 0x3e: case 0x64: case 0x65:
        return true;
    default:
        return long_mode && byte >> 4 == 4; /* REX */
    }
}

bool decode(struct cpu *cpu, struct instruction *instruction)
{
    bool long_mode = cpu->at.env->hflags & HF_CS64;
    memset(instruction, 0, sizeof(*instruction));
    for (unsigned at = 0;; at++) {
        if (!decode_more(cpu, instruction, at + 1))
            return false;
        if (!take_prefix(instruction, instruction->bytes[at], long_mode))
            break;
    }
    instruction->opcode = instruction->got - 1;
    return true;
}
