/* The interposed functions in the kernel's manner (-errno), shared by their libc names and by syscall(). */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

long call_ioctl_any(int fd, unsigned long request, uintptr_t argument);
long call_mmap(void *address, size_t length, int protection, int flags, int fd, off_t offset);
void leave(void *address, size_t length); /* tells the server that what is mapped there is about to go */
long call_munmap(void *address, size_t length);
long call_mremap(void *address, size_t length, size_t new_length, int flags, void *new_address);
long call_mprotect(void *address, size_t length, int protection, int key);
long call_madvise(void *address, size_t length, int advice);
long call_mbind(void *address, size_t length, int mode, const void *nodes, unsigned long count, unsigned flags);
long call_get_mempolicy(int *mode, void *nodes, unsigned long count, void *address, unsigned flags);
long call_close_range(unsigned first, unsigned last, unsigned flags);
/* 1: none of ours, nothing was done. */
long call_fallocate(int fd, int mode, off_t offset, off_t length);
int open_any(int directory, const char *path, int flags, mode_t mode); /* with errno, being a point of cancellation */
bool path_is_device(const char *path);
int msync_any(void *address, size_t length, int flags);
struct statx;
long call_statx(int directory, const char *path, int flags, unsigned mask, struct statx *status);
/* 0: none of ours. */
long refused_io(int fd);
long refused_io_at(int fd, off_t offset);
long refused_seek(int fd, int whence);
long refused_change(int fd);
