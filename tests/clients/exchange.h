/* What the clients that convert pages share: pins, and a guest that looks at a byte and changes it. */
#ifndef EXCHANGE_H
#define EXCHANGE_H

#include "client.h"

/* The kernel's gup_test file: pins the pages of a mapping for as long as a driver would. */
#define GUP_TEST "/sys/kernel/debug/gup_test"
struct pin_longterm_test {
    __u64 addr, size;
    __u32 flags;
};
#define PIN_LONGTERM_TEST_START _IOW('g', 7, struct pin_longterm_test)
#define PIN_LONGTERM_TEST_STOP _IO('g', 8)
enum { PIN_FOR_WRITE = 1 };

/* Reads the byte at RBX, writes CL over it, gives the old one out. */
extern const char guest_exchange[], guest_exchange_end[];
asm(".pushsection .rodata\n"
    "guest_exchange:\n"
    "    mov (%rbx), %al\n"
    "    mov %cl, (%rbx)\n"
    "    out %al, $0x10\n"
    "guest_exchange_end:\n"
    ".popsection\n");

#endif
