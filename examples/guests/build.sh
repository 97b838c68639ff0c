#!/bin/sh
# Build the demo guest: examples/guests/build.sh OUTPUT.elf
# No SIMD, since nobody enables it; no red zone, since exceptions use the stack.
set -eu
here=$(dirname "$0")
gcc -std=c11 -O2 -Wall -Wextra -Werror -m64 -march=x86-64 -ffreestanding -fno-builtin -fno-stack-protector -fno-pie \
    -fcf-protection=none -fno-asynchronous-unwind-tables -mno-red-zone -mgeneral-regs-only -mno-80387 \
    -nostdlib -static -no-pie -Wl,-T,"$here/guest.ld",--build-id=none,-z,noexecstack,-z,max-page-size=4096,--strip-all,--no-warn-rwx-segments \
    -o "$1" "$here/demo.c"
