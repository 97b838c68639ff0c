"""Numbers of the x86-64 system calls that we look at. Source: arch/x86/entry/syscalls/syscall_64.tbl."""

from __future__ import annotations

import enum


class Nr(enum.IntEnum):
    READ = 0
    WRITE = 1
    OPEN = 2
    CLOSE = 3
    STAT = 4
    FSTAT = 5
    LSTAT = 6
    LSEEK = 8
    MMAP = 9
    MPROTECT = 10
    MUNMAP = 11
    IOCTL = 16
    PREAD64 = 17
    PWRITE64 = 18
    READV = 19
    WRITEV = 20
    ACCESS = 21
    MREMAP = 25
    MSYNC = 26
    MADVISE = 28
    DUP = 32
    DUP2 = 33
    PAUSE = 34
    SENDFILE = 40
    CLONE = 56
    FORK = 57
    VFORK = 58
    FCNTL = 72
    FSYNC = 74
    FDATASYNC = 75
    TRUNCATE = 76
    FTRUNCATE = 77
    FCHMOD = 91
    FCHOWN = 93
    FSTATFS = 138
    MLOCK = 149
    READAHEAD = 187
    FSETXATTR = 190
    FGETXATTR = 193
    FLISTXATTR = 196
    FREMOVEXATTR = 199
    OPENAT = 257
    NEWFSTATAT = 262
    READLINK = 89
    READLINKAT = 267
    FACCESSAT = 269
    SPLICE = 275
    UTIMENSAT = 280
    FALLOCATE = 285
    DUP3 = 292
    PREADV = 295
    PWRITEV = 296
    NAME_TO_HANDLE_AT = 303
    SECCOMP = 317
    USERFAULTFD = 323
    COPY_FILE_RANGE = 326
    PREADV2 = 327
    PWRITEV2 = 328
    PKEY_MPROTECT = 329
    STATX = 332
    CLONE3 = 435
    CLOSE_RANGE = 436
    OPENAT2 = 437
    FACCESSAT2 = 439
