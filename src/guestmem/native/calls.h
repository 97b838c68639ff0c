/* The interposed functions in the kernel's manner (-errno), shared by their libc names and by syscall(). */
#pragma once

#include <stdint.h>
#include <sys/types.h>

long call_ioctl_any(int fd, unsigned long request, uintptr_t argument);
long call_mmap(void *address, size_t length, int protection, int flags, int fd, off_t offset);
long call_munmap(void *address, size_t length);
long call_mremap(void *address, size_t length, size_t new_length, int flags, void *new_address);
long call_mprotect(void *address, size_t length, int protection, int key);
long call_madvise(void *address, size_t length, int advice);
long call_close_range(unsigned first, unsigned last, unsigned flags);
/* 1: none of ours, nothing was done. */
long call_fallocate(int fd, int mode, off_t offset, off_t length);
